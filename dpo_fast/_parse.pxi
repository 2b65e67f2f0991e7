"""How both bindings read the NamedTuples of dpo_fast/_arguments.py: absence is None, and an address of 0 is refused
where there are elements."""

from cpython.tuple cimport PyTuple_GetSlice, PyTuple_Size


cdef uintptr_t optional(object address, int64_t count, str name) except? 0:
    """The address of `count` elements, 0 for None.

    Raises:
        ValueError: an address of 0, and there are elements.
    """
    cdef uintptr_t found
    if address is None:
        return 0
    found = address
    if found == 0 and count > 0:
        raise ValueError(f"{name} has no memory (a fake or meta tensor?)")
    return found


cdef uintptr_t required(object address, int64_t count, str name) except? 0:
    """As `optional`, but None is refused.

    Raises:
        ValueError: as `optional`, and None.
    """
    if address is None:
        raise ValueError(f"{name} must be given, found None")
    return optional(address, count, name)


cdef tuple fields(object arguments, str name):
    """A NamedTuple as an exact tuple: getting an item of a subclass takes ten times as long."""
    if not isinstance(arguments, tuple):
        raise TypeError(f"{name} must be a tuple as in dpo_fast._arguments, found {type(arguments).__name__}")
    return PyTuple_GetSlice(arguments, 0, PyTuple_Size(arguments))


cdef Rows parse_rows(object arguments) except *:
    cdef Rows rows
    cdef int64_t n_seqs
    cdef tuple each
    cdef int i
    (rows.logit_type, n_seqs, rows.rows_per_seq, rows.width, rows.seq_stride, rows.row_stride, rows.vocab_stride,
     rows.n_targets, options, logits, targets, row_mask, weights, rows.weights_double) = fields(arguments, "rows")
    each = fields(options, "options")
    if len(each) != kLogitOptions:
        raise ValueError(f"logits have {kLogitOptions} options, {list(logit_options())}, found {len(each)}")
    for i in range(kLogitOptions):
        if logit_option_traits(i).is_whole:
            set_logit_option(rows, i, each[i], 0)
        else:
            set_logit_option(rows, i, 0, each[i])
    if not 0 <= rows.logit_type < kLogitTypes:
        raise ValueError(f"there is no type of logits number {rows.logit_type}")
    if rows.vocab == 0:
        rows.vocab = rows.width
    if not 0 <= rows.vocab <= rows.width:
        raise ValueError(f"valid_vocab must be in [1, {rows.width}], the columns there are, found {rows.vocab}")
    rows.n_rows = n_seqs * rows.rows_per_seq
    rows.logits = <const void*>required(logits, rows.n_rows, "logits")
    rows.targets = <const int64_t*>required(targets, rows.n_rows * rows.n_targets, "targets")
    rows.row_mask = <const uint8_t*>optional(row_mask, rows.n_rows, "row_mask")
    rows.weights = <const void*>optional(weights, rows.n_rows, "token_weights")
    return rows


cdef Sequences parse_sequences(object arguments, const Rows* rows) except *:
    cdef Sequences seqs
    cu_seqlens, seqs.cu_int64, seqs.n_seqs, seqs.average = fields(arguments, "seqs")
    if seqs.n_seqs < 0:
        raise ValueError(f"the number of sequences must not be negative, found {seqs.n_seqs}")
    seqs.cu_seqlens = <const void*>optional(cu_seqlens, seqs.n_seqs + 1, "cu_seqlens")
    if seqs.cu_seqlens == NULL and seqs.n_seqs * rows.rows_per_seq != rows.n_rows:
        raise ValueError(
            f"{seqs.n_seqs} sequences of {rows.rows_per_seq} rows are not the {rows.n_rows} rows there are, and "
            f"cu_seqlens is None"
        )
    return seqs


cdef Pairs parse_pairs(object arguments, int64_t n_seqs) except *:
    cdef Pairs pairs
    cdef tuple each
    cdef int i
    index, pairs.n_pairs, pairs.divisor, baseline, numbers, order, offsets = fields(arguments, "pairs")
    if pairs.n_pairs < 0:
        raise ValueError(f"the number of pairs must not be negative, found {pairs.n_pairs}")
    pairs.pairs = <const int64_t*>optional(index, pairs.n_pairs, "pairs")
    pairs.baseline = <const double*>optional(baseline, 1, "baseline")
    each = fields(numbers, "numbers")
    if len(each) != kPairNumbers:
        raise ValueError(f"a pair has {kPairNumbers} numbers, {list(pair_numbers())}, found {len(each)}")
    for i in range(kPairNumbers):
        pairs.numbers[i] = NULL
        if each[i] is not None:
            pairs.numbers[i] = <const double*>optional(each[i], pairs.n_pairs, "pair_" + pair_number_name(i).decode())
    pairs.order = <const int64_t*>optional(order, pairs.n_pairs, "order")
    pairs.offsets = <const int64_t*>optional(offsets, n_seqs + 1, "offsets")
    if pairs.divisor == 0:
        pairs.divisor = pairs.n_pairs
    if pairs.pairs == NULL and 2 * pairs.n_pairs > n_seqs:
        raise ValueError(f"{pairs.n_pairs} pairs need {2 * pairs.n_pairs} sequences, found {n_seqs}")
    return pairs


cdef LossOptions parse_loss(object arguments) except *:
    cdef LossOptions options
    cdef tuple types, weights, parameters
    cdef int i
    types, weights, parameters, options.divergence, options.average = fields(arguments, "loss")
    if len(types) > kMaxLossTerms or len(types) != len(weights):
        raise ValueError(f"a loss has up to {kMaxLossTerms} terms with a weight each, found {types} and {weights}")
    if len(parameters) != kLossParameters:
        raise ValueError(f"a loss has {kLossParameters} parameters, {list(loss_parameters())}, found {len(parameters)}")
    if not 0 <= options.divergence < kDivergences:
        raise ValueError(f"there is no divergence number {options.divergence}")
    options.baseline = 0
    options.n_terms = len(types)
    for i in range(options.n_terms):
        options.types[i] = types[i]
        options.weights[i] = weights[i]
        if not 0 <= options.types[i] < kLossTypes:
            raise ValueError(f"there is no loss number {options.types[i]}")
    for i in range(kLossParameters):
        set_loss_parameter(options, i, parameters[i])
    return options


cdef TokenArrays parse_tokens(const Rows* rows, object logps, object stats, object statistics) except *:
    """statistics: None, or an address or None for each entry of the table."""
    cdef TokenArrays out
    cdef tuple each
    cdef int i
    out.logps = <void*>required(logps, rows.n_rows * rows.n_targets, "logps")
    out.stats = <void*>optional(stats, rows.n_rows, "stats")
    for i in range(kStatistics):
        out.statistics[i] = NULL
    if statistics is None:
        return out
    each = fields(statistics, "statistics")
    if len(each) != kStatistics:
        raise ValueError(f"a token has {kStatistics} statistics, {list(token_statistics())}, found {len(each)}")
    for i in range(kStatistics):
        if each[i] is not None:
            out.statistics[i] = <void*>optional(each[i], rows.n_rows, statistic_traits(i).name.decode())
    return out


cdef Losses parse_losses(object arguments, int64_t n_pairs) except *:
    cdef Losses out
    loss, losses, chosen_rewards, rejected_rewards, pair_grads = fields(arguments, "losses")
    out.loss = <void*>required(loss, 1, "loss")
    out.losses = <void*>required(losses, n_pairs, "losses")
    out.chosen_rewards = <void*>required(chosen_rewards, n_pairs, "chosen_rewards")
    out.rejected_rewards = <void*>required(rejected_rewards, n_pairs, "rejected_rewards")
    out.pair_grads = <double*>optional(pair_grads, n_pairs, "pair_grads")
    return out


cdef Grads no_grads() noexcept:
    cdef Grads grads
    cdef int i
    grads.token_logps = grads.seq_logps = grads.loss = grads.losses = NULL
    for i in range(kStatistics):
        grads.statistics[i] = NULL
    return grads


cdef Grads parse_grads(object arguments, const Rows* rows, int64_t n_seqs, int64_t n_pairs) except *:
    """n_seqs and n_pairs: -1 where there are none."""
    cdef Grads grads = no_grads()
    cdef tuple each
    cdef int i
    token_logps, statistics, seq_logps, loss, losses = fields(arguments, "grads")
    if n_seqs < 0 and seq_logps is not None:
        raise ValueError("grad_seq_logps needs seqs")
    if n_pairs < 0 and (loss is not None or losses is not None):
        raise ValueError("grad_loss and grad_losses need seqs and pairs")
    grads.token_logps = <const void*>optional(token_logps, rows.n_rows * rows.n_targets, "grad_token_logps")
    each = fields(statistics, "grads of statistics")
    if len(each) not in (0, kStatistics):
        raise ValueError(f"a token has {kStatistics} statistics, {list(token_statistics())}, found {len(each)}")
    for i in range(len(each)):
        if each[i] is not None:
            if not statistic_traits(i).has_gradient:
                raise ValueError(f"{statistic_traits(i).name.decode()} has no gradient")
            name = "grad_" + statistic_traits(i).name.decode()
            grads.statistics[i] = <const void*>optional(each[i], rows.n_rows, name)
    grads.seq_logps = <const void*>optional(seq_logps, n_seqs, "grad_seq_logps")
    grads.loss = <const void*>optional(loss, 1, "grad_loss")
    grads.losses = <const void*>optional(losses, n_pairs, "grad_losses")
    return grads


cdef GradTensor parse_out(object arguments, const Rows* rows) except *:
    cdef GradTensor out
    data, out.seq_stride, out.row_stride, out.vocab_stride = fields(arguments, "out")
    out.data = <char*>required(data, rows.n_rows, "grad_logits")
    return out


def logit_options():
    """Names of the options of the logits, in their order: DPO_FAST_LOGIT_OPTIONS in csrc/sequence_math.h."""
    return tuple([logit_option_traits(i).name.decode() for i in range(kLogitOptions)])


def token_statistics():
    """Names of the per-token statistics, in their order: DPO_FAST_STATISTICS in csrc/row_math.h."""
    return tuple([statistic_traits(i).name.decode() for i in range(kStatistics)])


def differentiable_statistics():
    """Those of them that have a gradient."""
    return tuple([statistic_traits(i).name.decode() for i in range(kStatistics) if statistic_traits(i).has_gradient])


def loss_parameters():
    """Names of the numbers that a loss reads: DPO_FAST_LOSS_PARAMETERS in csrc/preference_loss.h."""
    return tuple([loss_parameter_name(i).decode() for i in range(kLossParameters)])


def pair_numbers():
    """Names of the numbers that each pair may have of its own: DPO_FAST_PAIR_NUMBERS in csrc/preference_loss.h."""
    return tuple([pair_number_name(i).decode() for i in range(kPairNumbers)])


def loss_types():
    """(name, flags) of each loss, by its number: DPO_FAST_LOSSES and LossFlags in csrc/preference_loss.h."""
    return [(loss_name(i).decode(), loss_flags(i)) for i in range(kLossTypes)]


cdef tuple _PAIR_NAMES = tuple(["pair_" + name for name in pair_numbers()])
