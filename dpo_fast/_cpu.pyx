# cython: language_level=3
# distutils: language = c++
"""The CPU kernels: parallel loops over rows, sequences and pairs around the row functions of csrc/cpu.

Each entry is one fused operation: `token_forward` stops at token log-probs, `sequence_forward` at sequence log-probs,
`dpo_forward` at the loss and its derivatives, all in one call; `backward` goes from incoming gradients at any of these
levels to the gradient of the logits in another.

Arrays come as addresses (0: absent) with sizes, so that torch tensors and NumPy arrays take the same path and no torch
symbol is needed. The callers (dpo_fast/ops.py, dpo_fast/numpy.py) have checked shapes and types; what depends on
values (targets, pairs, cu_seqlens) is checked here, before anything is read or written through it. Float arrays beside
the logits are float32, or float64 when the logits are; token weights and reference log-probs are always float64;
integers are int64; all of them contiguous.

`rows` is (logit_type, logits, seq_stride, row_stride, vocab_stride, n_seqs, rows_per_seq, vocab, targets, n_targets,
row_mask, weights, ignore_index, logit_scale, temperature, softcap), strides in elements, softcap 0 for none; packed
rows are one sequence of n_rows. `seqs` is (cu_seqlens, n_seqs, average). `pairs` is (pairs, n_pairs, pair_weights,
baseline, divisor): pairs 0 means first half chosen, second half rejected, a number of -1 in them an absent side; the
reduced loss is the sum over pairs divided by divisor, by n_pairs where that is 0. `loss` is dpo_fast._loss_options.LossOptions.
"""

from cython.parallel cimport prange
from libc.math cimport NAN, exp
from libc.stdint cimport int64_t, uint8_t, uintptr_t
from libc.stdlib cimport free, malloc


cdef extern from "cpu/rows.h" namespace "dpo_fast" nogil:
    cdef struct LogitTransform:
        double logit_scale, temperature, softcap

    cdef struct RowPart:
        pass

    cdef struct RowKernels:
        const char* isa
        void (*exp_float)(const float*, float*, int64_t, bint)
        void (*exp_double)(const double*, double*, int64_t)

    cdef struct Rows:
        const RowKernels* kernels
        char* logits
        const int64_t* targets
        const uint8_t* row_mask
        const double* weights
        LogitTransform transform
        int64_t seq_stride, row_stride, vocab_stride
        int64_t rows_per_seq, n_rows, vocab, n_targets, ignore_index
        int logit_type
        bint wide

    cdef struct TokenArrays:
        void* logps
        void* stats
        void* entropy
        void* mean_logits
        uint8_t* is_top1
        void* log_sum_sq_probs

    cdef struct TokenGrads:
        const void* logps
        const void* entropy
        const double* row

    cdef struct GradTensor:
        char* data
        int64_t seq_stride, row_stride, vocab_stride

    const RowKernels* compiled_kernels(int)
    bint processor_supports(const RowKernels*)
    int64_t pieces_per_row(const Rows&)
    void finish_rows_setup(Rows&)
    void advise_huge_pages(char*, int64_t)
    double load_float(const void*, int64_t, bint)
    void store_float(void*, int64_t, double, bint)
    int row_state(const Rows&, int64_t)
    void forward_piece(const Rows&, int64_t, int64_t, const TokenArrays&, RowPart*)
    void finish_row(const Rows&, int64_t, const RowPart*, const TokenArrays&)
    void finish_ignored_row(const Rows&, int64_t, const TokenArrays&)
    void backward_piece(const Rows&, int64_t, int64_t, const TokenArrays&, const TokenGrads&, const GradTensor&)
    void zero_piece(const Rows&, int64_t, int64_t, const GradTensor&)


cdef extern from "preference_loss.h" namespace "dpo_fast" nogil:
    const int kMaxLossTerms, kLossTypes, kDivergences, kUnpaired, kLengths

    cdef struct LossOptions:
        int n_terms
        int* types
        double* weights
        double beta, label_smoothing, discopop_tau, simpo_gamma
        int divergence
        double alpha, desirable_weight, undesirable_weight, baseline, tokens_per_pair
        bint average

    cdef struct Side:
        bint present
        double logp, ratio, length

    cdef struct Pair:
        Side chosen, rejected

    cdef struct PairLoss:
        double loss, d_chosen, d_rejected

    const char* loss_name(int)
    int loss_flags(int)
    PairLoss pair_loss(Pair, const LossOptions&)


cdef struct Sequences:
    const int64_t* cu_seqlens
    int64_t n_seqs
    bint average


cdef struct Pairs:
    const int64_t* pairs
    int64_t n_pairs
    const double* weights
    const double* baseline
    double divisor


# Below this many logits a second thread costs more than it saves (docs/performance.md).
cdef int64_t kSerialLogits = 1 << 16
# A thread takes up to this many logits at a time: rows that follow each other in memory stream faster.
cdef int64_t kTaskLogits = 1 << 19

cdef const RowKernels* kernels = NULL
cdef bint forked = False


def after_fork_in_child():
    """OpenMP's threads do not live on in a forked child: work there in the calling thread."""
    global forked
    forked = True


def isas():
    """Names of the compiled instruction sets, widest first, and whether this processor runs each."""
    cdef int i = 0
    result = []
    while compiled_kernels(i) != NULL:
        result.append((compiled_kernels(i).isa.decode(), bool(processor_supports(compiled_kernels(i)))))
        i += 1
    return result


def set_isa(str name):
    """Chooses the instruction set; None takes the widest that this processor runs.

    Raises:
        ValueError: the set is not compiled in, or this processor does not have it.
    """
    global kernels
    cdef const RowKernels* candidate
    cdef int i = 0
    while compiled_kernels(i) != NULL:
        candidate = compiled_kernels(i)
        if processor_supports(candidate) and (name is None or candidate.isa.decode() == name):
            kernels = candidate
            return
        i += 1
    raise ValueError(f"instruction set {name!r} cannot be used here; compiled, and supported by this processor: {isas()}")


def isa():
    """The instruction set in use."""
    return kernels.isa.decode()


def exp_float(uintptr_t x, uintptr_t y, int64_t n, bint half):
    """y = exp(x) for n floats at addresses x and y, as the kernels compute it (half: for half-precision logits)."""
    kernels.exp_float(<const float*>x, <float*>y, n, half)


def exp_double(uintptr_t x, uintptr_t y, int64_t n):
    """y = exp(x) for n doubles at addresses x and y, as the kernels compute it."""
    kernels.exp_double(<const double*>x, <double*>y, n)


cdef void* allocate(int64_t count, size_t size) except NULL:
    cdef void* p = malloc((count if count > 0 else 1) * size)
    if p == NULL:
        raise MemoryError(f"no memory for {count * <int64_t>size} bytes of scratch space")
    return p


cdef int refuse_null(uintptr_t address, int64_t count, str name) except -1:
    if address == 0 and count > 0:
        raise ValueError(f"{name} has no memory (a fake or meta tensor?)")
    return 0


cdef Rows make_rows(tuple spec) except *:
    cdef Rows rows
    cdef int64_t n_seqs
    cdef uintptr_t logits, targets, row_mask, weights
    (rows.logit_type, n_seqs, rows.rows_per_seq, rows.vocab, rows.seq_stride, rows.row_stride, rows.vocab_stride,
     rows.n_targets, rows.ignore_index, rows.transform.temperature, rows.transform.logit_scale, rows.transform.softcap,
     logits, targets, row_mask, weights) = spec
    rows.n_rows = n_seqs * rows.rows_per_seq
    refuse_null(logits, rows.n_rows, "logits")
    refuse_null(targets, rows.n_rows * rows.n_targets, "targets")
    rows.logits = <char*>logits
    rows.targets = <const int64_t*>targets
    rows.row_mask = <const uint8_t*>row_mask
    rows.weights = <const double*>weights
    rows.kernels = kernels
    finish_rows_setup(rows)
    return rows


cdef Sequences make_seqs(tuple spec, const Rows* rows) except *:
    cdef Sequences seqs
    cdef uintptr_t cu_seqlens
    cdef int64_t s
    cu_seqlens, seqs.n_seqs, seqs.average = spec
    seqs.cu_seqlens = <const int64_t*>cu_seqlens
    if seqs.cu_seqlens != NULL:
        if seqs.cu_seqlens[0] != 0:
            raise ValueError(f"cu_seqlens[0] must be 0, found {seqs.cu_seqlens[0]}")
        for s in range(seqs.n_seqs):
            if seqs.cu_seqlens[s + 1] < seqs.cu_seqlens[s]:
                raise ValueError(
                    f"cu_seqlens must not decrease: cu_seqlens[{s + 1}] = {seqs.cu_seqlens[s + 1]} follows "
                    f"{seqs.cu_seqlens[s]}"
                )
        if seqs.cu_seqlens[seqs.n_seqs] != rows.n_rows:
            raise ValueError(
                f"cu_seqlens[{seqs.n_seqs}] must be the number of rows, {rows.n_rows}, found "
                f"{seqs.cu_seqlens[seqs.n_seqs]}"
            )
    return seqs


cdef Pairs make_pairs(tuple spec, int64_t n_seqs, bint unpaired) except *:
    cdef Pairs pairs
    cdef uintptr_t address, weights, baseline
    cdef int64_t i
    address, pairs.n_pairs, weights, baseline, pairs.divisor = spec
    pairs.pairs = <const int64_t*>address
    pairs.weights = <const double*>weights
    pairs.baseline = <const double*>baseline
    if pairs.divisor == 0:
        pairs.divisor = pairs.n_pairs
    if pairs.pairs == NULL:
        if 2 * pairs.n_pairs > n_seqs:
            raise ValueError(f"{pairs.n_pairs} pairs need {2 * pairs.n_pairs} sequences, found {n_seqs}")
    else:
        for i in range(2 * pairs.n_pairs):
            if pairs.pairs[i] >= n_seqs or pairs.pairs[i] < (-1 if unpaired else 0):
                raise IndexError(f"pairs[{i // 2}, {i % 2}] = {pairs.pairs[i]} is outside [0, {n_seqs})")
    return pairs


cdef LossOptions make_loss(tuple spec) except *:
    cdef LossOptions options
    cdef int i
    (types, weights, options.beta, options.label_smoothing, options.discopop_tau, options.simpo_gamma,
     options.divergence, options.alpha, options.desirable_weight, options.undesirable_weight,
     options.tokens_per_pair, options.average) = spec
    if len(types) > kMaxLossTerms or len(types) != len(weights):
        raise ValueError(f"a loss has up to {kMaxLossTerms} terms with a weight each, found {types} and {weights}")
    if not 0 <= options.divergence < kDivergences:
        raise ValueError(f"there is no divergence number {options.divergence}")
    options.n_terms = len(types)
    for i in range(options.n_terms):
        options.types[i] = types[i]
        options.weights[i] = weights[i]
        if not 0 <= options.types[i] < kLossTypes:
            raise ValueError(f"there is no loss number {options.types[i]}")
    return options


cdef bint any_term(const LossOptions* options, int flag) noexcept nogil:
    cdef int i
    for i in range(options.n_terms):
        if loss_flags(options.types[i]) & flag:
            return True
    return False


def loss_types():
    """(name, flags) of each loss, by its number: DPO_FAST_LOSSES and LossFlags in csrc/preference_loss.h."""
    return [(loss_name(i).decode(), loss_flags(i)) for i in range(kLossTypes)]


cdef inline int64_t seq_start(const Sequences* seqs, const Rows* rows, int64_t s) noexcept nogil:
    return seqs.cu_seqlens[s] if seqs.cu_seqlens != NULL else s * rows.rows_per_seq


cdef inline int64_t chosen_of(const Pairs* pairs, int64_t p) noexcept nogil:
    return pairs.pairs[2 * p] if pairs.pairs != NULL else p


cdef inline int64_t rejected_of(const Pairs* pairs, int64_t p) noexcept nogil:
    return pairs.pairs[2 * p + 1] if pairs.pairs != NULL else p + pairs.n_pairs


cdef int threads_for(int64_t logits, int threads) noexcept nogil:
    return 1 if forked or logits < kSerialLogits else threads


cdef int64_t units_per_task(const Rows* rows, int64_t units, int threads) noexcept nogil:
    """How many pieces of rows a thread takes at a time: enough tasks for threads that do not run alike."""
    cdef int64_t by_size = kTaskLogits * pieces_per_row(rows[0]) // rows.vocab
    cdef int64_t by_count = units // (8 * threads)
    cdef int64_t least = by_size if by_size < by_count else by_count
    return least if least > 0 else 1


cdef int raise_bad_target(const Rows* rows, int64_t row, int64_t k) except -1:
    cdef int64_t seq = row // rows.rows_per_seq
    place = [row % rows.rows_per_seq]
    if seq > 0 or rows.rows_per_seq < rows.n_rows:
        place.insert(0, seq)
    if rows.n_targets > 1:
        place.append(k)
    raise IndexError(
        f"target {rows.targets[row * rows.n_targets + k]} at position {place} is outside [0, {rows.vocab}) and is not "
        f"ignore_index"
    )


cdef int64_t find_kept(const Rows* rows, int64_t* kept) except -1:
    """Writes the numbers of the rows that count, returns how many they are.

    Raises:
        IndexError: a target outside the vocabulary.
    """
    cdef int64_t row, n_kept = 0
    cdef int state
    for row in range(rows.n_rows):
        state = row_state(rows[0], row)
        if state < 0:
            raise_bad_target(rows, row, -1 - state)
        if state > 0:
            kept[n_kept] = row
            n_kept += 1
    return n_kept


cdef void forward_rows(
    const Rows* rows, const int64_t* kept, int64_t n_kept, RowPart* parts, const TokenArrays* out, int threads
) noexcept nogil:
    cdef int64_t pieces = pieces_per_row(rows[0])
    cdef int64_t unit, i, row, next_kept = 0
    cdef int64_t chunk = units_per_task(rows, n_kept * pieces, threads)
    if threads == 1:  # not even a team of one
        for unit in range(n_kept * pieces):
            forward_piece(rows[0], kept[unit // pieces], unit % pieces, out[0], &parts[unit])
        for i in range(n_kept):
            finish_row(rows[0], kept[i], &parts[i * pieces], out[0])
    else:
        for unit in prange(n_kept * pieces, num_threads=threads, schedule="dynamic", chunksize=chunk):
            forward_piece(rows[0], kept[unit // pieces], unit % pieces, out[0], &parts[unit])
        for i in prange(n_kept, num_threads=threads, schedule="static"):
            finish_row(rows[0], kept[i], &parts[i * pieces], out[0])
    for row in range(rows.n_rows):
        if next_kept < n_kept and kept[next_kept] == row:
            next_kept += 1
        else:
            finish_ignored_row(rows[0], row, out[0])


cdef int run_forward(const Rows* rows, const TokenArrays* out, int threads) except -1:
    cdef int64_t* kept = <int64_t*>allocate(rows.n_rows, sizeof(int64_t))
    cdef RowPart* parts = NULL
    cdef int64_t n_kept
    try:
        refuse_null(<uintptr_t>out.logps, rows.n_rows * rows.n_targets, "logps")
        n_kept = find_kept(rows, kept)
        parts = <RowPart*>allocate(n_kept * pieces_per_row(rows[0]), sizeof(RowPart))
        with nogil:
            forward_rows(rows, kept, n_kept, parts, out, threads_for(n_kept * rows.vocab, threads))
    finally:
        free(parts)
        free(kept)
    return 0


cdef inline void backward_unit(
    const Rows* rows, int64_t row, int64_t piece, const TokenArrays* saved, const TokenGrads* grads,
    const GradTensor* out,
) noexcept nogil:
    if row_state(rows[0], row) > 0:
        backward_piece(rows[0], row, piece, saved[0], grads[0], out[0])
    else:
        zero_piece(rows[0], row, piece, out[0])


cdef void backward_rows(
    const Rows* rows, const TokenArrays* saved, const TokenGrads* grads, const GradTensor* out, int threads
) noexcept nogil:
    cdef int64_t pieces = pieces_per_row(rows[0])
    cdef int64_t unit
    cdef int64_t chunk = units_per_task(rows, rows.n_rows * pieces, threads)
    if threads == 1:
        for unit in range(rows.n_rows * pieces):
            backward_unit(rows, unit // pieces, unit % pieces, saved, grads, out)
    else:
        for unit in prange(rows.n_rows * pieces, num_threads=threads, schedule="dynamic", chunksize=chunk):
            backward_unit(rows, unit // pieces, unit % pieces, saved, grads, out)


cdef double weight_sum(const Rows* rows, const Sequences* seqs, int64_t s) noexcept nogil:
    """What `average` divides by: the weights of the sequence's rows that count."""
    cdef int64_t row
    cdef double total = 0
    for row in range(seq_start(seqs, rows, s), seq_start(seqs, rows, s + 1)):
        if row_state(rows[0], row) > 0:
            total += rows.weights[row] if rows.weights != NULL else 1
    return total


cdef void sum_sequences(
    const Rows* rows, const Sequences* seqs, const void* token_logps, double* seq_logps
) noexcept nogil:
    """seq_logps[s] = sum_n w_n logp_n, over sum_n w_n for `average`; 0 for a sequence without rows that count."""
    cdef int64_t s, row
    cdef double total, logp, norm
    for s in range(seqs.n_seqs):
        total = 0
        for row in range(seq_start(seqs, rows, s), seq_start(seqs, rows, s + 1)):
            if row_state(rows[0], row) > 0:
                logp = load_float(token_logps, row, rows.wide)
                total += logp * rows.weights[row] if rows.weights != NULL else logp
        if seqs.average:
            norm = weight_sum(rows, seqs, s)
            total = total / norm if norm != 0 else 0
        seq_logps[s] = total


cdef void spread_to_rows(
    const Rows* rows, const Sequences* seqs, const double* grad_seq, double* grad_rows
) noexcept nogil:
    """grad_rows[n] = w_n grad_seq[s(n)], over sum_n w_n for `average`."""
    cdef int64_t s, row
    cdef double g, norm
    for s in range(seqs.n_seqs):
        g = grad_seq[s]
        if seqs.average:
            norm = weight_sum(rows, seqs, s)
            g = g / norm if norm != 0 else 0
        for row in range(seq_start(seqs, rows, s), seq_start(seqs, rows, s + 1)):
            grad_rows[row] = g * rows.weights[row] if rows.weights != NULL else g


cdef int refuse_null_losses(
    int64_t n_pairs, uintptr_t loss, uintptr_t losses, uintptr_t chosen_rewards, uintptr_t rejected_rewards
) except -1:
    refuse_null(loss, 1, "loss")
    refuse_null(losses, n_pairs, "losses")
    refuse_null(chosen_rewards, n_pairs, "chosen_rewards")
    return refuse_null(rejected_rewards, n_pairs, "rejected_rewards")


cdef void count_targets(const Rows* rows, const Sequences* seqs, double* lengths) noexcept nogil:
    """lengths[s]: the targets that are not ignore_index, whatever their weight."""
    cdef int64_t s, row
    for s in range(seqs.n_seqs):
        lengths[s] = 0
        for row in range(seq_start(seqs, rows, s), seq_start(seqs, rows, s + 1)):
            lengths[s] += rows.targets[row * rows.n_targets] != rows.ignore_index


cdef void wpo_weights(
    const Rows* rows, const Sequences* seqs, const TokenArrays* tokens, double* seq_weights
) noexcept nogil:
    """seq_weights[s] = exp(mean_n(logp_n - log sum_v p_v^2)) (WPO, Zhou et al. 2024, arXiv:2406.11827, eq. 2)."""
    cdef int64_t s, row, n
    cdef double total
    for s in range(seqs.n_seqs):
        total = 0
        n = 0
        for row in range(seq_start(seqs, rows, s), seq_start(seqs, rows, s + 1)):
            if row_state(rows[0], row) > 0:
                total += load_float(tokens.logps, row, rows.wide) - load_float(tokens.log_sum_sq_probs, row, rows.wide)
                n += 1
        seq_weights[s] = exp(total / n) if n > 0 else 1


cdef Side side_of(
    int64_t s, const double* logps, const void* ref_logps, bint ref_double, const double* lengths
) noexcept nogil:
    cdef Side side
    side.present = s >= 0
    side.logp = logps[s] if s >= 0 else 0
    side.ratio = side.logp
    if s >= 0 and ref_logps != NULL:
        side.ratio -= load_float(ref_logps, s, ref_double)
    side.length = lengths[s] if s >= 0 and lengths != NULL else 0
    return side


cdef double chosen_tokens(const Pairs* pairs, const double* lengths) noexcept nogil:
    cdef int64_t p
    cdef double total = 0
    for p in range(pairs.n_pairs):
        if chosen_of(pairs, p) >= 0:
            total += lengths[chosen_of(pairs, p)]
    return total


cdef void pair_losses(
    const Pairs* pairs, LossOptions options, const double* logps, const void* ref_logps, bint ref_double,
    const double* lengths, const double* seq_weights, bint wide, void* loss, void* losses, void* chosen_rewards, void* rejected_rewards,
    double* pair_grads,
) noexcept nogil:
    """The losses, rewards and derivatives of all pairs. lengths and seq_weights may be null."""
    cdef int64_t p, c, d
    cdef double total = 0, weight
    cdef Pair pair
    cdef PairLoss result
    options.baseline = pairs.baseline[0] if pairs.baseline != NULL else 0
    if options.tokens_per_pair == 0 and lengths != NULL:
        options.tokens_per_pair = chosen_tokens(pairs, lengths) / pairs.n_pairs
    for p in range(pairs.n_pairs):
        c = chosen_of(pairs, p)
        d = rejected_of(pairs, p)
        pair.chosen = side_of(c, logps, ref_logps, ref_double, lengths)
        pair.rejected = side_of(d, logps, ref_logps, ref_double, lengths)
        result = pair_loss(pair, options)
        weight = pairs.weights[p] if pairs.weights != NULL else 1
        if seq_weights != NULL and c >= 0 and d >= 0:
            weight *= seq_weights[c] * seq_weights[d]
        if weight == 0:  # switched off, also where its loss is infinite
            result.loss = result.d_chosen = result.d_rejected = 0
        total += weight * result.loss
        store_float(losses, p, weight * result.loss, wide)
        store_float(chosen_rewards, p, options.beta * pair.chosen.ratio if c >= 0 else NAN, wide)
        store_float(rejected_rewards, p, options.beta * pair.rejected.ratio if d >= 0 else NAN, wide)
        if pair_grads != NULL:
            pair_grads[2 * p] = weight * result.d_chosen
            pair_grads[2 * p + 1] = weight * result.d_rejected
    store_float(loss, 0, total / pairs.divisor, wide)


cdef void pair_grads_to_seqs(
    const Pairs* pairs, const double* pair_grads, const void* grad_loss, const void* grad_losses,
    const void* grad_logps, int64_t n_seqs, bint wide, double* grad_seq,
) noexcept nogil:
    cdef int64_t s, p, c, d
    cdef double g, common = 0
    for s in range(n_seqs):
        grad_seq[s] = load_float(grad_logps, s, wide) if grad_logps != NULL else 0
    if grad_loss != NULL:
        common = load_float(grad_loss, 0, wide) / pairs.divisor
    for p in range(pairs.n_pairs):
        g = common + (load_float(grad_losses, p, wide) if grad_losses != NULL else 0)
        if g != 0:  # no gradient, no part in it: a derivative may be NaN
            c = chosen_of(pairs, p)
            d = rejected_of(pairs, p)
            if c >= 0:
                grad_seq[c] += g * pair_grads[2 * p]
            if d >= 0:
                grad_seq[d] += g * pair_grads[2 * p + 1]


cdef TokenArrays make_arrays(
    uintptr_t logps, uintptr_t stats, uintptr_t entropy, uintptr_t mean_logits, uintptr_t is_top1,
    uintptr_t log_sum_sq_probs,
) noexcept:
    cdef TokenArrays out
    out.logps = <void*>logps
    out.stats = <void*>stats
    out.entropy = <void*>entropy
    out.mean_logits = <void*>mean_logits
    out.is_top1 = <uint8_t*>is_top1
    out.log_sum_sq_probs = <void*>log_sum_sq_probs
    return out


def expect_writes(uintptr_t address, int64_t n_bytes):
    """Says that n_bytes of fresh memory will be written, all of them: large pieces may come in huge pages."""
    advise_huge_pages(<char*>address, n_bytes)


def token_forward(
    tuple rows, int threads, uintptr_t logps, uintptr_t stats, uintptr_t entropy, uintptr_t mean_logits,
    uintptr_t is_top1, uintptr_t log_sum_sq_probs,
):
    """Fills logps [rows, n_targets] and those of the other outputs that are not 0: stats [rows, 2], which backward
    needs, and one number per row (is_top1: per target)."""
    cdef Rows r = make_rows(rows)
    cdef TokenArrays out = make_arrays(logps, stats, entropy, mean_logits, is_top1, log_sum_sq_probs)
    run_forward(&r, &out, threads)


def sequence_forward(
    tuple rows, tuple seqs, int threads, uintptr_t logps, uintptr_t stats, uintptr_t seq_logps, bint double_sums
):
    """Fills logps [rows], stats [rows, 2] (if not 0) and seq_logps [n_seqs] (float64 with double_sums)."""
    cdef Rows r = make_rows(rows)
    cdef Sequences q = make_seqs(seqs, &r)
    cdef TokenArrays out = make_arrays(logps, stats, 0, 0, 0, 0)
    cdef double* sums = NULL
    cdef int64_t s
    refuse_null(seq_logps, q.n_seqs, "seq_logps")
    run_forward(&r, &out, threads)
    try:
        sums = <double*>allocate(q.n_seqs, sizeof(double))
        sum_sequences(&r, &q, out.logps, sums)
        for s in range(q.n_seqs):
            store_float(<void*>seq_logps, s, sums[s], r.wide or double_sums)
    finally:
        free(sums)


def dpo_forward(
    tuple rows, tuple seqs, tuple pairs_spec, tuple loss_spec, int threads, bint wpo, bint float_sums,
    uintptr_t ref_logps, bint ref_double,
    uintptr_t logps, uintptr_t stats, uintptr_t entropy, uintptr_t mean_logits, uintptr_t is_top1,
    uintptr_t log_sum_sq_probs, uintptr_t seq_logps, uintptr_t loss, uintptr_t losses, uintptr_t chosen_rewards,
    uintptr_t rejected_rewards, uintptr_t pair_grads,
):
    """Fills logps [rows], the other statistics of tokens [rows] that are not 0, seq_logps [n_seqs], loss [], losses and
    rewards [n_pairs]; for backward, if not 0, stats [rows, 2] and pair_grads [n_pairs, 2] (float64): the derivatives of
    each pair's loss with respect to its two log-probs. ref_logps [n_seqs] are float32, or float64 with ref_double. With
    wpo, log_sum_sq_probs has to be there; with float_sums, sums are rounded to float32 as ref_logps were."""
    cdef Rows r = make_rows(rows)
    cdef Sequences q = make_seqs(seqs, &r)
    cdef LossOptions options = make_loss(loss_spec)
    cdef Pairs p = make_pairs(pairs_spec, q.n_seqs, any_term(&options, kUnpaired))
    cdef TokenArrays out = make_arrays(logps, stats, entropy, mean_logits, is_top1, log_sum_sq_probs)
    cdef double* sums = NULL
    cdef double* lengths = NULL
    cdef double* seq_weights = NULL
    cdef int64_t s
    refuse_null(seq_logps, q.n_seqs, "seq_logps")
    refuse_null_losses(p.n_pairs, loss, losses, chosen_rewards, rejected_rewards)
    if wpo:
        refuse_null(log_sum_sq_probs, r.n_rows, "log_sum_sq_probs")
    run_forward(&r, &out, threads)
    try:
        sums = <double*>allocate(q.n_seqs, sizeof(double))
        sum_sequences(&r, &q, out.logps, sums)
        for s in range(q.n_seqs):
            if float_sums:
                sums[s] = <float>sums[s]
            store_float(<void*>seq_logps, s, sums[s], r.wide)
        if any_term(&options, kLengths):
            lengths = <double*>allocate(q.n_seqs, sizeof(double))
            count_targets(&r, &q, lengths)
        if wpo:
            seq_weights = <double*>allocate(q.n_seqs, sizeof(double))
            wpo_weights(&r, &q, &out, seq_weights)
        pair_losses(
            &p, options, sums, <const void*>ref_logps, ref_double, lengths, seq_weights, r.wide, <void*>loss,
            <void*>losses, <void*>chosen_rewards, <void*>rejected_rewards, <double*>pair_grads,
        )
    finally:
        free(seq_weights)
        free(lengths)
        free(sums)


def backward(
    tuple rows, tuple seqs, tuple pairs_spec, int threads, uintptr_t logps, uintptr_t stats, uintptr_t entropy,
    uintptr_t pair_grads, uintptr_t grad_token_logps, uintptr_t grad_entropy, uintptr_t grad_seq_logps,
    uintptr_t grad_loss, uintptr_t grad_losses, uintptr_t grad_logits, int64_t grad_seq_stride,
    int64_t grad_row_stride, int64_t grad_vocab_stride,
):
    """Fills grad_logits (which may be the logits) from what forward left and the incoming gradients of the token
    log-probs and entropy, of the sequence log-probs (with `seqs`), and of the loss (with `pairs_spec`)."""
    cdef Rows r = make_rows(rows)
    cdef TokenArrays saved = make_arrays(logps, stats, entropy, 0, 0, 0)
    cdef TokenGrads grads
    cdef GradTensor out
    cdef Sequences q
    cdef Pairs p
    cdef double* grad_seq = NULL
    cdef double* grad_rows = NULL
    cdef int64_t s
    grads.logps = <const void*>grad_token_logps
    grads.entropy = <const void*>grad_entropy
    grads.row = NULL
    refuse_null(grad_logits, r.n_rows, "grad_logits")
    refuse_null(logps, r.n_rows * r.n_targets, "logps")
    refuse_null(stats, r.n_rows, "stats")
    if grads.entropy != NULL:
        refuse_null(entropy, r.n_rows, "entropy")
    out.data = <char*>grad_logits
    out.seq_stride = grad_seq_stride
    out.row_stride = grad_row_stride
    out.vocab_stride = grad_vocab_stride
    try:
        if seqs is not None:
            q = make_seqs(seqs, &r)
            grad_seq = <double*>allocate(q.n_seqs, sizeof(double))
            grad_rows = <double*>allocate(r.n_rows, sizeof(double))
            if pairs_spec is not None:
                p = make_pairs(pairs_spec, q.n_seqs, True)
                refuse_null(pair_grads, p.n_pairs, "pair_grads")
            else:
                p.n_pairs = 0
                p.divisor = 1
            pair_grads_to_seqs(
                &p, <const double*>pair_grads, <const void*>grad_loss, <const void*>grad_losses,
                <const void*>grad_seq_logps, q.n_seqs, r.wide, grad_seq,
            )
            spread_to_rows(&r, &q, grad_seq, grad_rows)
            grads.row = grad_rows
        with nogil:
            backward_rows(&r, &saved, &grads, &out, threads_for(r.n_rows * r.vocab, threads))
    finally:
        free(grad_rows)
        free(grad_seq)


def preference_forward(
    tuple pairs_spec, tuple loss_spec, bint wide, int64_t n_seqs, uintptr_t logps, uintptr_t ref_logps,
    bint ref_double, uintptr_t lengths, uintptr_t loss, uintptr_t losses, uintptr_t chosen_rewards, uintptr_t rejected_rewards,
    uintptr_t pair_grads,
):
    """As the end of dpo_forward, from logps [n_seqs] of float32, or float64 if `wide`, and the lengths [n_seqs]
    (float64) where the loss reads them."""
    cdef LossOptions options = make_loss(loss_spec)
    cdef Pairs p = make_pairs(pairs_spec, n_seqs, any_term(&options, kUnpaired))
    cdef double* values
    cdef int64_t s
    refuse_null(logps, n_seqs, "logps")
    refuse_null_losses(p.n_pairs, loss, losses, chosen_rewards, rejected_rewards)
    if any_term(&options, kLengths):
        refuse_null(lengths, n_seqs, "lengths")
    values = <double*>allocate(n_seqs, sizeof(double))
    for s in range(n_seqs):
        values[s] = load_float(<const void*>logps, s, wide)
    pair_losses(
        &p, options, values, <const void*>ref_logps, ref_double, <const double*>lengths, NULL, wide, <void*>loss,
        <void*>losses, <void*>chosen_rewards, <void*>rejected_rewards, <double*>pair_grads,
    )
    free(values)


def preference_backward(
    tuple pairs_spec, bint wide, int64_t n_seqs, uintptr_t pair_grads, uintptr_t grad_loss, uintptr_t grad_losses,
    uintptr_t grad_logps,
):
    """Fills grad_logps [n_seqs] from the incoming gradients of loss and losses (0: none)."""
    cdef Pairs p = make_pairs(pairs_spec, n_seqs, True)
    cdef double* grad_seq
    cdef int64_t s
    refuse_null(pair_grads, p.n_pairs, "pair_grads")
    refuse_null(grad_logps, n_seqs, "grad_logps")
    grad_seq = <double*>allocate(n_seqs, sizeof(double))
    pair_grads_to_seqs(
        &p, <const double*>pair_grads, <const void*>grad_loss, <const void*>grad_losses, NULL, n_seqs, wide, grad_seq
    )
    for s in range(n_seqs):
        store_float(<void*>grad_logps, s, grad_seq[s], wide)
    free(grad_seq)


set_isa(None)
