# The arguments of dpo_fast/_arguments.py as C++ structs; included by the CPU and the CUDA binding. None is "not given";
# an address of 0 where there are elements is refused.
from libc.stdint cimport int64_t, uint8_t, uintptr_t

from dpo_fast._declarations cimport (
    GradArrays,
    GradTensor,
    LossOptions,
    LossOutputs,
    Pairs,
    Reference,
    RowBatch,
    Sequences,
    TokenArrays,
    is_unpaired,
    kDivergences,
    kLossParameters,
    kLossTypes,
    kMaxLossTerms,
    kPairNumbers,
    kStatistics,
    loss_flags,
    loss_name,
    loss_parameter_name,
    pair_number_name,
    reads_lengths,
    set_loss_parameter,
    statistic_name,
)

_STATISTICS = tuple([statistic_name(i).decode() for i in range(kStatistics)])
_PARAMETERS = tuple([loss_parameter_name(i).decode() for i in range(kLossParameters)])
_NUMBERS = tuple([pair_number_name(i).decode() for i in range(kPairNumbers)])


cdef void* needed(object address, int64_t count, str name) except? NULL:
    """The address of an array that has to be there."""
    if address is None:
        raise ValueError(f"{name} must be given")
    cdef uintptr_t found = address
    if found == 0 and count > 0:
        raise ValueError(f"{name} has no memory (a fake or meta tensor?)")
    return <void*>found


cdef void* optional(object address, int64_t count, str name) except? NULL:
    """The address of an array, null where it is not given."""
    return NULL if address is None else needed(address, count, name)


cdef int parse_rows(object spec, RowBatch* rows) except -1:
    cdef int64_t n_seqs, valid_vocab
    (rows.logit_type, n_seqs, rows.rows_per_seq, rows.width, rows.seq_stride, rows.row_stride, rows.vocab_stride,
     rows.n_targets, rows.ignore_index, rows.transform.temperature, rows.transform.logit_scale, rows.transform.softcap,
     valid_vocab, logits, targets, row_mask, weights, rows.weights_double) = spec
    rows.vocab = valid_vocab if valid_vocab else rows.width
    if not 0 < rows.vocab <= rows.width:
        raise ValueError(f"valid_vocab must be at most the number of columns, {rows.width}, found {valid_vocab}")
    rows.n_rows = n_seqs * rows.rows_per_seq
    rows.logits = needed(logits, rows.n_rows, "logits")
    rows.targets = <const int64_t*>needed(targets, rows.n_rows * rows.n_targets, "targets")
    rows.row_mask = <const uint8_t*>optional(row_mask, rows.n_rows, "row_mask")
    rows.weights = optional(weights, rows.n_rows, "token_weights")
    return 0


cdef int parse_sequences(object spec, const RowBatch* rows, Sequences* seqs) except -1:
    bounds, seqs.cu_int64, seqs.n_seqs, seqs.average = spec
    seqs.cu_seqlens = optional(bounds, seqs.n_seqs + 1, "cu_seqlens")
    if bounds is None and seqs.n_seqs * rows.rows_per_seq != rows.n_rows:
        raise ValueError(f"{seqs.n_seqs} sequences of {rows.rows_per_seq} rows are not the {rows.n_rows} that there are")
    return 0


cdef int parse_pairs(object spec, int64_t n_seqs, Pairs* pairs) except -1:
    cdef int i
    numbers_of_pairs, pairs.n_pairs, pairs.divisor, baseline, numbers, order, offsets = spec
    pairs.pairs = <const int64_t*>optional(numbers_of_pairs, pairs.n_pairs, "pairs")
    pairs.baseline = <const double*>optional(baseline, 1, "baseline")
    pairs.order = <const int64_t*>optional(order, pairs.n_pairs, "order")
    pairs.offsets = <const int64_t*>optional(offsets, n_seqs + 1, "offsets")
    if len(numbers) != kPairNumbers:
        raise ValueError(f"a pair has the numbers {_NUMBERS}, found {len(numbers)}")
    for i in range(kPairNumbers):
        pairs.numbers[i] = <const double*>optional(numbers[i], pairs.n_pairs, _NUMBERS[i])
    if pairs.divisor == 0:
        pairs.divisor = pairs.n_pairs
    if pairs.pairs == NULL and 2 * pairs.n_pairs > n_seqs:
        raise ValueError(f"{pairs.n_pairs} pairs need {2 * pairs.n_pairs} sequences, found {n_seqs}")
    return 0


cdef int parse_loss(object spec, LossOptions* options) except -1:
    cdef int i
    types, weights, parameters, options.divergence, options.average = spec
    if len(types) > kMaxLossTerms or len(types) != len(weights):
        raise ValueError(f"a loss has up to {kMaxLossTerms} terms with a weight each, found {types} and {weights}")
    if not 0 <= options.divergence < kDivergences:
        raise ValueError(f"there is no divergence number {options.divergence}")
    if len(parameters) != kLossParameters:
        raise ValueError(f"a loss has the parameters {_PARAMETERS}, found {len(parameters)}")
    options.n_terms = len(types)
    options.baseline = 0
    for i in range(options.n_terms):
        options.types[i] = types[i]
        options.weights[i] = weights[i]
        if not 0 <= options.types[i] < kLossTypes:
            raise ValueError(f"there is no loss number {options.types[i]}")
    for i in range(kLossParameters):
        set_loss_parameter(options[0], i, parameters[i])
    return 0


cdef int parse_tokens(
    const RowBatch* rows, object logps, object stats, object statistics, TokenArrays* out
) except -1:
    """`statistics` in the order of all, None for those that are not wanted; an empty tuple: none is."""
    cdef int i
    out.logps = needed(logps, rows.n_rows * rows.n_targets, "logps")
    out.stats = optional(stats, rows.n_rows, "stats")
    for i in range(kStatistics):
        out.statistics[i] = NULL
    if len(statistics) not in (0, kStatistics):
        raise ValueError(f"the statistics are {_STATISTICS}, found {len(statistics)}")
    for i in range(<int>len(statistics)):
        out.statistics[i] = optional(statistics[i], rows.n_rows, _STATISTICS[i])
    return 0


cdef int parse_losses(object spec, int64_t n_pairs, LossOutputs* out) except -1:
    loss, losses, chosen_rewards, rejected_rewards, pair_grads = spec
    out.loss = needed(loss, 1, "loss")
    out.losses = needed(losses, n_pairs, "losses")
    out.chosen_rewards = needed(chosen_rewards, n_pairs, "chosen_rewards")
    out.rejected_rewards = needed(rejected_rewards, n_pairs, "rejected_rewards")
    out.pair_grads = <double*>optional(pair_grads, n_pairs, "pair_grads")
    return 0


cdef int parse_grads(object spec, const RowBatch* rows, int64_t n_seqs, int64_t n_pairs, GradArrays* grads) except -1:
    token_logps, entropy, lse, seq_logps, loss, losses = spec
    grads.token_logps = optional(token_logps, rows.n_rows * rows.n_targets, "grad_logps")
    grads.entropy = optional(entropy, rows.n_rows, "grad_entropy")
    grads.lse = optional(lse, rows.n_rows, "grad_lse")
    grads.seq_logps = optional(seq_logps, n_seqs, "grad_seq_logps")
    grads.loss = optional(loss, 1, "grad_loss")
    grads.losses = optional(losses, n_pairs, "grad_losses")
    return 0


cdef int parse_out(object spec, const RowBatch* rows, GradTensor* out) except -1:
    data, out.seq_stride, out.row_stride, out.vocab_stride = spec
    out.data = <char*>needed(data, rows.n_rows, "grad_logits")
    return 0


def token_statistics():
    """The names of the statistics, in the order in which they are listed."""
    return _STATISTICS


def loss_parameters():
    """The names of a loss's parameters, in the order of LossOptions.parameters."""
    return _PARAMETERS


def pair_numbers():
    """The names of the numbers of each pair, in the order of KernelPairs.numbers."""
    return _NUMBERS
