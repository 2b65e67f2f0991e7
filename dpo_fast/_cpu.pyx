# cython: language_level=3
# distutils: language = c++
"""The CPU kernels: a binding of csrc/cpu/batch.h.

Each function is one fused operation: `token_forward` stops at token log-probs, `sequence_forward` at sequence
log-probs, `dpo_forward` at the loss and its derivatives; `backward` goes from incoming gradients at any of these levels
to the gradient of the logits.

Arrays come as addresses under the names of dpo_fast/_arguments.py, so torch tensors and NumPy arrays take one path and no
torch symbol is needed. The callers have checked shapes and types; values (targets, pairs, cu_seqlens) are checked below,
before anything is read or written through them. Float arrays beside the logits are float32, or float64 when the logits
are; token weights and reference log-probs are either, as their flags say; numbers of pairs, baseline, lengths and
pair_grads are float64; integers are int64 (cu_seqlens also int32); all of them contiguous.
"""

from libcpp cimport bool as cbool

include "_parse.pxi"


cdef extern from "cpu/batch.h" namespace "dpo_fast" nogil:
    cdef struct RowKernels:
        const char* isa
        void (*exp_float)(const float*, float*, int64_t, cbool)
        void (*exp_double)(const double*, double*, int64_t)

    cdef cppclass Rows(RowBatch):
        const RowKernels* kernels

    cdef struct SavedArrays:
        const void* logps
        const void* stats
        const void* entropy

    cdef struct LossBatch:
        Sequences seqs
        Pairs pairs
        LossOptions options
        Reference reference
        LossOutputs out

    cdef enum FaultKind:
        kNoFault, kNoMemory, kTarget, kFirstBound, kFallingBound, kLastBound, kPairIndex

    cdef cppclass Fault:
        FaultKind kind
        int64_t place, second, value

    const RowKernels* compiled_kernels(int)
    bint processor_supports(const RowKernels*)
    void finish_rows_setup(Rows&)
    void advise_huge_pages(char*, int64_t)
    void set_forked()
    Fault check_sequences(const Rows&, const Sequences&)
    Fault check_pairs(const Pairs&, int64_t, cbool)
    Fault forward_tokens(const Rows&, const TokenArrays&, int)
    Fault forward_sequences(const Rows&, const Sequences&, const TokenArrays&, void*, cbool, int)
    Fault forward_losses(const Rows&, const LossBatch&, const TokenArrays&, cbool, void*, int)
    Fault losses_of_logps(const LossBatch&, const void*, const double*, cbool)
    Fault backward_of "dpo_fast::backward" (
        const Rows&, const Sequences*, const Pairs*, const SavedArrays&, const double*, const GradArrays&,
        const GradTensor&, int)
    Fault losses_backward(const Pairs&, const double*, const GradArrays&, int64_t, cbool, void*)


cdef const RowKernels* kernels = NULL


def after_fork_in_child():
    """OpenMP's threads do not live on in a forked child: work there in the calling thread."""
    set_forked()


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


def expect_writes(uintptr_t address, int64_t n_bytes):
    """Says that n_bytes of fresh memory will be written, all of them: large pieces may come in huge pages."""
    advise_huge_pages(<char*>address, n_bytes)


def loss_types():
    """(name, flags) of each loss, by its number: DPO_FAST_LOSSES and LossFlags in csrc/preference_loss.h."""
    return [(loss_name(i).decode(), loss_flags(i)) for i in range(kLossTypes)]


cdef int raise_bad_target(const Rows* rows, Fault fault) except -1:
    cdef int64_t seq = fault.place // rows.rows_per_seq
    position = [fault.place % rows.rows_per_seq]
    if seq > 0 or rows.rows_per_seq < rows.n_rows:
        position.insert(0, seq)
    if rows.n_targets > 1:
        position.append(fault.second)
    raise IndexError(
        f"target {fault.value} at position {position} is outside [0, {rows.vocab}) and is not ignore_index"
    )


cdef int check(const Rows* rows, Fault fault) except -1:
    """Raises where a value is wrong."""
    if fault.kind == kNoFault:
        return 0
    if fault.kind == kTarget:
        raise_bad_target(rows, fault)
    if fault.kind == kFirstBound:
        raise ValueError(f"cu_seqlens[0] must be 0, found {fault.value}")
    if fault.kind == kFallingBound:
        raise ValueError(
            f"cu_seqlens must not decrease: cu_seqlens[{fault.place}] = {fault.value} follows {fault.second}"
        )
    if fault.kind == kLastBound:
        raise ValueError(
            f"cu_seqlens[{fault.place}] must be the number of rows, {fault.second}, found {fault.value}"
        )
    if fault.kind == kPairIndex:
        raise IndexError(
            f"pairs[{fault.place // 2}, {fault.place % 2}] = {fault.value} is outside [0, {fault.second})"
        )
    raise MemoryError("no memory for scratch space")


cdef int make_rows(object spec, Rows* rows) except -1:
    parse_rows(spec, rows)
    rows.kernels = kernels
    finish_rows_setup(rows[0])
    return 0


cdef int make_sequences(object spec, const Rows* rows, Sequences* seqs) except -1:
    parse_sequences(spec, rows, seqs)
    return check(rows, check_sequences(rows[0], seqs[0]))


cdef int make_pairs(object spec, int64_t n_seqs, bint may_be_absent, Pairs* pairs) except -1:
    parse_pairs(spec, n_seqs, pairs)
    return check(NULL, check_pairs(pairs[0], n_seqs, may_be_absent))


def token_forward(rows, int threads, logps, stats, statistics):
    """Fills logps [rows, n_targets] and those of the others that are given: stats [rows, 2], which backward needs, and
    one number per row of each statistic (is_top1: per target)."""
    cdef Rows r
    cdef TokenArrays out
    cdef Fault fault
    make_rows(rows, &r)
    parse_tokens(&r, logps, stats, statistics, &out)
    with nogil:
        fault = forward_tokens(r, out, threads)
    check(&r, fault)


def sequence_forward(rows, seqs, int threads, logps, stats, seq_logps, bint double_sums):
    """Fills logps [rows], stats [rows, 2] (if given) and seq_logps [n_seqs] (float64 with double_sums)."""
    cdef Rows r
    cdef Sequences q
    cdef TokenArrays out
    cdef Fault fault
    make_rows(rows, &r)
    make_sequences(seqs, &r, &q)
    parse_tokens(&r, logps, stats, (), &out)
    cdef void* sums = needed(seq_logps, q.n_seqs, "seq_logps")
    with nogil:
        fault = forward_sequences(r, q, out, sums, double_sums, threads)
    check(&r, fault)


def dpo_forward(
    rows, seqs, pairs, loss, int threads, bint wpo, ref_logps, bint ref_double, logps, stats, statistics, seq_logps,
    losses,
):
    """Fills logps [rows], the statistics [rows] that are given (with wpo, log_sum_sq_probs has to be), seq_logps
    [n_seqs], loss [], losses and rewards [P]; for backward, if given, stats [rows, 2] and pair_grads [P, 2]: the
    derivatives of each pair's loss by its two log-probs. ref_logps [n_seqs] are float32, or float64 with ref_double."""
    cdef Rows r
    cdef LossBatch batch
    cdef TokenArrays out
    cdef Fault fault
    make_rows(rows, &r)
    make_sequences(seqs, &r, &batch.seqs)
    parse_loss(loss, &batch.options)
    make_pairs(pairs, batch.seqs.n_seqs, is_unpaired(batch.options), &batch.pairs)
    parse_tokens(&r, logps, stats, statistics, &out)
    parse_losses(losses, batch.pairs.n_pairs, &batch.out)
    batch.reference.logps = optional(ref_logps, batch.seqs.n_seqs, "ref_logps")
    batch.reference.is_double = ref_double
    batch.reference.round_sums = r.logit_type != 1
    cdef void* sums = needed(seq_logps, batch.seqs.n_seqs, "seq_logps")
    if wpo:
        needed(statistics[_STATISTICS.index("log_sum_sq_probs")], r.n_rows, "log_sum_sq_probs")
    with nogil:
        fault = forward_losses(r, batch, out, wpo, sums, threads)
    check(&r, fault)


def backward(rows, seqs, pairs, int threads, saved, grads, out):
    """Fills `out` (which may be the logits) from what forward left and the incoming gradients: of token log-probs,
    entropy and lse, of sequence log-probs (with `seqs`), and of the loss (with `pairs`)."""
    cdef Rows r
    cdef Sequences q
    cdef Pairs p
    cdef SavedArrays s
    cdef GradArrays g
    cdef GradTensor target
    cdef Fault fault
    cdef int64_t n_seqs = 0, n_pairs = 0
    cdef bint with_seqs = seqs is not None, with_pairs = pairs is not None
    make_rows(rows, &r)
    if with_seqs:
        make_sequences(seqs, &r, &q)
        n_seqs = q.n_seqs
    if with_pairs:
        make_pairs(pairs, n_seqs, True, &p)
        n_pairs = p.n_pairs
    logps, stats, entropy, pair_grads, _ = saved
    parse_grads(grads, &r, n_seqs, n_pairs, &g)
    parse_out(out, &r, &target)
    s.logps = needed(logps, r.n_rows * r.n_targets, "logps")
    s.stats = needed(stats, r.n_rows, "stats")
    s.entropy = needed(entropy, r.n_rows, "entropy") if g.entropy != NULL else NULL
    if g.seq_logps != NULL and not with_seqs or (g.loss != NULL or g.losses != NULL) and not with_pairs:
        raise ValueError("gradients of sequences need seqs, those of losses seqs and pairs")
    cdef const double* derivatives = NULL
    if with_pairs:
        derivatives = <const double*>needed(pair_grads, n_pairs, "pair_grads")
    with nogil:
        fault = backward_of(
            r, &q if with_seqs else NULL, &p if with_pairs else NULL, s, derivatives, g, target, threads)
    check(&r, fault)


def preference_forward(
    pairs, loss, bint wide, bint round_sums, int64_t n_seqs, logps, ref_logps, bint ref_double, lengths, losses
):
    """As the end of dpo_forward, from logps [n_seqs] of float32, or float64 if `wide`, and the lengths [n_seqs] where
    the loss reads them. round_sums: logits below float64 are behind the log-probs."""
    cdef LossBatch batch
    parse_loss(loss, &batch.options)
    make_pairs(pairs, n_seqs, is_unpaired(batch.options), &batch.pairs)
    parse_losses(losses, batch.pairs.n_pairs, &batch.out)
    batch.seqs.n_seqs = n_seqs
    batch.reference.logps = optional(ref_logps, n_seqs, "ref_logps")
    batch.reference.is_double = ref_double
    batch.reference.round_sums = round_sums
    if reads_lengths(batch.options):
        needed(lengths, n_seqs, "lengths")
    cdef void* values = needed(logps, n_seqs, "logps")
    check(NULL, losses_of_logps(batch, values, <const double*>optional(lengths, n_seqs, "lengths"), wide))


def preference_backward(pairs, bint wide, int64_t n_seqs, pair_grads, grad_loss, grad_losses, grad_logps):
    """Fills grad_logps [n_seqs] from the incoming gradients of loss and losses, which may be None."""
    cdef Pairs p
    cdef GradArrays g
    make_pairs(pairs, n_seqs, True, &p)
    g.token_logps = g.entropy = g.lse = g.seq_logps = NULL
    g.loss = optional(grad_loss, 1, "grad_loss")
    g.losses = optional(grad_losses, p.n_pairs, "grad_losses")
    cdef const double* derivatives = <const double*>needed(pair_grads, p.n_pairs, "pair_grads")
    cdef void* out = needed(grad_logps, n_seqs, "grad_logps")
    check(NULL, losses_backward(p, derivatives, g, n_seqs, wide, out))


set_isa(None)
