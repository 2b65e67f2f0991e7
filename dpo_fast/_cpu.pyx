# cython: language_level=3
# distutils: language = c++
"""The CPU kernels: a binding of csrc/cpu/batch.h.

Each entry is one fused operation: `token_forward` stops at token log-probs, `sequence_forward` at sequence log-probs,
`dpo_forward` at the loss and its derivatives; `backward` goes from incoming gradients at any of these levels to the
gradient of the logits. `preference_forward` and `preference_backward` are the loss alone.

Arrays come as addresses with sizes, in the NamedTuples of dpo_fast/_arguments.py (or plain tuples like them), so torch
tensors and NumPy arrays take the same path and no torch symbol is needed. The callers have checked shapes and types;
values (targets, pairs, cu_seqlens) are checked here, before anything is read or written through them. `threads` is the
number of threads to use at most. The GIL is released while the kernels run.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uintptr_t

from dpo_fast._declarations cimport *


cdef extern from "cpu/rows.h" namespace "dpo_fast" nogil:
    cdef struct RowKernels:
        const char* isa
        void (*exp_float)(const float*, float*, int64_t, bint)
        void (*exp_double)(const double*, double*, int64_t)

    const RowKernels* compiled_kernels(int)
    bint processor_supports(const RowKernels*)
    void advise_huge_pages(char*, int64_t)


cdef extern from "cpu/batch.h" namespace "dpo_fast" nogil:
    const int kNoFault, kBadTarget, kBadPair, kSeqlensStart, kSeqlensDecrease, kSeqlensEnd

    cdef struct BatchStatus:
        int fault
        int64_t index, k

    cdef struct References:
        const void* logps
        bint is_double

    void c_after_fork_in_child "dpo_fast::after_fork_in_child"()
    BatchStatus c_token_forward "dpo_fast::token_forward"(
        const RowKernels&, const Rows&, int, const TokenArrays&) except +
    BatchStatus c_sequence_forward "dpo_fast::sequence_forward"(
        const RowKernels&, const Rows&, const Sequences&, int, const TokenArrays&, void*, bint) except +
    BatchStatus c_dpo_forward "dpo_fast::dpo_forward"(
        const RowKernels&, const Rows&, const Sequences&, const Pairs&, const LossOptions&, int, bint,
        const References&, const TokenArrays&, void*, const Losses&) except +
    BatchStatus c_backward "dpo_fast::backward"(
        const RowKernels&, const Rows&, const Sequences*, const Pairs*, int, const TokenArrays&, const double*,
        const Grads&, const GradTensor&) except +
    BatchStatus c_preference_forward "dpo_fast::preference_forward"(
        const Pairs&, const LossOptions&, bint, bint, int64_t, const void*, const References&, const double*,
        const Losses&) except +
    BatchStatus c_preference_backward "dpo_fast::preference_backward"(
        const Pairs&, bint, int64_t, const double*, const Grads&, void*) except +


cdef extern from "cpu/sparse_head.h" namespace "dpo_fast" nogil:
    cdef struct SelectedRows:
        int32_t* columns
        float* values
        int32_t* counts
        float* skipped
        int64_t n_rows, vocab, most

    cdef struct SparseRows:
        int32_t* columns
        float* values
        int64_t* positions
        int64_t n_rows, vocab

    cdef struct SparseInput:
        const float* logps
        const float* stats
        const float* grads
        const float* allowed

    int64_t c_column_blocks "dpo_fast::column_blocks"(int64_t)
    bint c_select_sparse "dpo_fast::select_sparse"(
        const RowKernels&, const Rows&, const SparseInput&, int, const SelectedRows&) except +
    int64_t c_count_entries "dpo_fast::count_entries"(const SelectedRows&)
    void c_pack_sparse "dpo_fast::pack_sparse"(const SelectedRows&, int, const SparseRows&)
    void c_sparse_times_table "dpo_fast::sparse_times_table"(
        const RowKernels&, const SparseRows&, int, const void*, int64_t, int64_t, int, float*) except +
    void c_sparse_transposed_times_table "dpo_fast::sparse_transposed_times_table"(
        const RowKernels&, const SparseRows&, int, const void*, int64_t, int64_t, bint, int, float*) except +
    void c_sparse_column_sums "dpo_fast::sparse_column_sums"(const SparseRows&, bint, int, float*) except +


include "_parse.pxi"


cdef const RowKernels* kernels = NULL


def after_fork_in_child():
    """Works in the calling thread from here on: OpenMP's threads do not live on in a forked child."""
    c_after_fork_in_child()


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
    raise ValueError(f"instruction set {name!r} cannot be used here; compiled, and whether it runs here: {isas()}")


def isa():
    """The instruction set in use."""
    return kernels.isa.decode()


def exp_float(uintptr_t x, uintptr_t y, int64_t n, bint half):
    """y = exp(x) for n floats at addresses x and y, as the kernels compute it (half: for half-precision logits)."""
    kernels.exp_float(<const float*>x, <float*>y, n, half)


def exp_double(uintptr_t x, uintptr_t y, int64_t n):
    """The same for doubles."""
    kernels.exp_double(<const double*>x, <double*>y, n)


def expect_writes(uintptr_t address, int64_t n_bytes):
    """Says that n_bytes of fresh memory will be written, all of them: large pieces may come in huge pages."""
    advise_huge_pages(<char*>address, n_bytes)


cdef int raise_bad_target(const Rows* rows, int64_t row, int64_t k) except -1:
    place = [row % rows.rows_per_seq]
    if rows.rows_per_seq < rows.n_rows:
        place.insert(0, row // rows.rows_per_seq)
    if rows.n_targets > 1:
        place.append(k)
    target = f"target {rows.targets[row * rows.n_targets + k]} at position {place}"
    raise IndexError(f"{target} is outside [0, {rows.vocab}) and is not ignore_index")


cdef int check(
    BatchStatus status, const Rows* rows, const Sequences* seqs, const Pairs* pairs, int64_t n_seqs
) except -1:
    """Raises what the kernels found.

    Raises:
        IndexError: a target outside the vocabulary, a pair outside the sequences.
        ValueError: cu_seqlens that do not rise from 0 to the number of rows.
    """
    cdef int64_t i = status.index
    if status.fault == kNoFault:
        return 0
    if status.fault == kBadTarget:
        raise_bad_target(rows, i, status.k)
    if status.fault == kBadPair:
        raise IndexError(f"pairs[{i // 2}, {i % 2}] = {pairs.pairs[i]} is outside [0, {n_seqs})")
    if status.fault == kSeqlensStart:
        raise ValueError(f"cu_seqlens[0] must be 0, found {seq_bound(seqs[0], 0)}")
    if status.fault == kSeqlensDecrease:
        found = f"cu_seqlens[{i + 1}] = {seq_bound(seqs[0], i + 1)} follows {seq_bound(seqs[0], i)}"
        raise ValueError(f"cu_seqlens must not decrease: {found}")
    raise ValueError(f"cu_seqlens[{i}] must be the number of rows, {rows.n_rows}, found {seq_bound(seqs[0], i)}")


cdef References parse_references(object ref_logps, bint ref_double, int64_t n_seqs) except *:
    return References(<const void*>optional(ref_logps, n_seqs, "ref_logps"), ref_double)


def token_forward(object rows, int threads, object logps, object stats, object statistics):
    """Fills logps [rows, n_targets], stats [rows, 2], which backward reads (None: no backward), and those of
    `statistics` (an address or None for each of `token_statistics()`, or None) that are wanted, [rows] each, is_top1
    [rows, n_targets].

    Raises:
        IndexError: a target outside the vocabulary.
        ValueError: an address of 0, or None, where there has to be an array.
    """
    cdef Rows r = parse_rows(rows)
    cdef TokenArrays tokens = parse_tokens(&r, logps, stats, statistics)
    cdef BatchStatus status
    with nogil:
        status = c_token_forward(kernels[0], r, threads, tokens)
    check(status, &r, NULL, NULL, 0)


def sequence_forward(
    object rows, object seqs, int threads, object logps, object stats, object seq_logps, bint double_sums
):
    """Fills logps [rows], stats [rows, 2] (if not None) and seq_logps [n_seqs] (float64 with double_sums).

    Raises:
        IndexError, ValueError: as token_forward, and for cu_seqlens.
    """
    cdef Rows r = parse_rows(rows)
    cdef Sequences q = parse_sequences(seqs, &r)
    cdef TokenArrays tokens = parse_tokens(&r, logps, stats, None)
    cdef void* sums = <void*>required(seq_logps, q.n_seqs, "seq_logps")
    cdef BatchStatus status
    with nogil:
        status = c_sequence_forward(kernels[0], r, q, threads, tokens, sums, double_sums)
    check(status, &r, &q, NULL, q.n_seqs)


def dpo_forward(
    object rows, object seqs, object pairs, object loss, int threads, bint wpo, object ref_logps, bint ref_double,
    object logps, object stats, object statistics, object seq_logps, object losses,
):
    """Fills logps [rows], stats [rows, 2] (if not None) and statistics [rows] as token_forward, seq_logps [n_seqs] and
    the arrays of `losses`. ref_logps [n_seqs] are float32, or float64 with ref_double, or None. With wpo,
    log_sum_sq_probs has to be among the statistics.

    Raises:
        IndexError, ValueError: as sequence_forward, and for pairs.
    """
    cdef Rows r = parse_rows(rows)
    cdef Sequences q = parse_sequences(seqs, &r)
    cdef Pairs p = parse_pairs(pairs, q.n_seqs)
    cdef LossOptions options = parse_loss(loss)
    cdef References ref = parse_references(ref_logps, ref_double, q.n_seqs)
    cdef TokenArrays tokens = parse_tokens(&r, logps, stats, statistics)
    cdef void* sums = <void*>required(seq_logps, q.n_seqs, "seq_logps")
    cdef Losses out = parse_losses(losses, p.n_pairs)
    cdef BatchStatus status
    if wpo and r.n_rows > 0 and tokens.statistics[kStatistic_log_sum_sq_probs] == NULL:
        raise ValueError("log_sum_sq_probs must be given with wpo, found None")
    with nogil:
        status = c_dpo_forward(kernels[0], r, q, p, options, threads, wpo, ref, tokens, sums, out)
    check(status, &r, &q, &p, q.n_seqs)


def backward(object rows, object seqs, object pairs, int threads, object saved, object grads, object out):
    """Fills the gradient of the logits (which may be the logits) from what forward left and the incoming gradients of
    tokens, of the sequence log-probs (with `seqs`), and of the losses (with `seqs` and `pairs`, else None).

    Raises:
        IndexError, ValueError: as dpo_forward.
    """
    cdef Rows r = parse_rows(rows)
    cdef Sequences q
    cdef Pairs p
    cdef const double* pair_derivatives = NULL
    cdef int64_t n_seqs = -1, n_pairs = -1
    cdef bint with_seqs = seqs is not None, with_pairs = seqs is not None and pairs is not None
    logps, stats, entropy, pair_grads, _ = fields(saved, "saved")
    cdef TokenArrays tokens = parse_tokens(&r, logps, required(stats, r.n_rows, "stats"), None)
    cdef GradTensor grad_logits = parse_out(out, &r)
    cdef BatchStatus status
    if with_seqs:
        q = parse_sequences(seqs, &r)
        n_seqs = q.n_seqs
    if with_pairs:
        p = parse_pairs(pairs, n_seqs)
        n_pairs = p.n_pairs
        pair_derivatives = <const double*>required(pair_grads, n_pairs, "pair_grads")
    cdef Grads incoming = parse_grads(grads, &r, n_seqs, n_pairs)
    if incoming.statistics[kStatistic_entropy] != NULL:
        tokens.statistics[kStatistic_entropy] = <void*>required(entropy, r.n_rows, "entropy")
    with nogil:
        status = c_backward(
            kernels[0], r, &q if with_seqs else NULL, &p if with_pairs else NULL, threads, tokens, pair_derivatives,
            incoming, grad_logits)
    check(status, &r, &q, &p, n_seqs)


def preference_forward(
    object pairs, object loss, bint wide, bint round_sums, int64_t n_seqs, object logps, object ref_logps,
    bint ref_double, object lengths, object losses,
):
    """As the end of dpo_forward, from logps [n_seqs] of float32, or float64 if `wide`, and the lengths [n_seqs]
    (float64) where the loss reads them. round_sums: the logps are sums for logits of a type below float64, and are
    rounded to float32 where ref_logps are float32.

    Raises:
        IndexError, ValueError: as dpo_forward.
    """
    cdef Pairs p = parse_pairs(pairs, n_seqs)
    cdef LossOptions options = parse_loss(loss)
    cdef const void* values = <const void*>required(logps, n_seqs, "logps")
    cdef References ref = parse_references(ref_logps, ref_double, n_seqs)
    cdef const double* tokens = <const double*>optional(lengths, n_seqs, "lengths")
    cdef Losses out = parse_losses(losses, p.n_pairs)
    cdef BatchStatus status
    if reads_lengths(options):
        required(lengths, n_seqs, "lengths")
    with nogil:
        status = c_preference_forward(p, options, wide, round_sums, n_seqs, values, ref, tokens, out)
    check(status, NULL, NULL, &p, n_seqs)


def preference_backward(
    object pairs, bint wide, int64_t n_seqs, object pair_grads, object grad_loss, object grad_losses, object grad_logps
):
    """Fills grad_logps [n_seqs] from the incoming gradients of loss and losses (None: none).

    Raises:
        IndexError, ValueError: as dpo_forward.
    """
    cdef Pairs p = parse_pairs(pairs, n_seqs)
    cdef const double* derivatives = <const double*>required(pair_grads, p.n_pairs, "pair_grads")
    cdef Grads grads = no_grads()
    cdef void* out = <void*>required(grad_logps, n_seqs, "grad_logps")
    cdef BatchStatus status
    grads.loss = <const void*>optional(grad_loss, 1, "grad_loss")
    grads.losses = <const void*>optional(grad_losses, p.n_pairs, "grad_losses")
    with nogil:
        status = c_preference_backward(p, wide, n_seqs, derivatives, grads, out)
    check(status, NULL, NULL, &p, n_seqs)


# --- sparse gradients of a head's logits ------------------------------------------------------------------------------


cdef SelectedRows parse_selected(object arguments) except *:
    cdef SelectedRows rows
    columns, values, counts, skipped, rows.n_rows, rows.vocab, rows.most = fields(arguments, "selected")
    rows.columns = <int32_t*>required(columns, rows.n_rows * rows.most, "columns")
    rows.values = <float*>required(values, rows.n_rows * rows.most, "values")
    rows.counts = <int32_t*>required(counts, rows.n_rows * rows.vocab, "counts")
    rows.skipped = <float*>required(skipped, rows.n_rows, "skipped")
    return rows


cdef SparseRows parse_sparse(object arguments) except *:
    cdef SparseRows rows
    columns, values, positions, rows.n_rows, rows.vocab, n_entries = fields(arguments, "sparse")
    rows.columns = <int32_t*>required(columns, n_entries, "columns")
    rows.values = <float*>required(values, n_entries, "values")
    rows.positions = <int64_t*>required(positions, 1, "positions")
    return rows


cdef int check_table(int logit_type) except -1:
    if logit_type == kFloat64 or not 0 <= logit_type < kLogitTypes:
        raise ValueError(f"there are no sparse kernels for type number {logit_type}")
    return 0


def column_blocks(int64_t vocab):
    """The number of blocks of columns of sparse rows."""
    return c_column_blocks(vocab)


def select_sparse(object rows, int threads, object logps, object stats, object grads, object allowed, object selected):
    """Fills `selected` (KernelSelected) with the gradient of logits [rows, V], of adjacent columns and one target a
    row, all of them kept, from logps [rows], stats [rows, 2] and the gradients of the log-probs [rows]. Each row leaves
    out a mass of at most allowed [rows] (all but the target from 1 on; below 0 the row is dense). All are float32.
    Returns the number of entries, or -1 where most rows looked at are dense: nothing is promised about `selected` then.

    Raises:
        ValueError: an address of 0, or None; float64 logits; columns that are not adjacent; several targets.
        IndexError: a target outside the vocabulary.
    """
    cdef Rows r = parse_rows(rows)
    cdef SelectedRows out = parse_selected(selected)
    cdef SparseInput given
    cdef int64_t row, found = -1
    given.logps = <const float*>required(logps, r.n_rows, "logps")
    given.stats = <const float*>required(stats, r.n_rows, "stats")
    given.grads = <const float*>required(grads, r.n_rows, "grads")
    given.allowed = <const float*>required(allowed, r.n_rows, "allowed")
    check_table(r.logit_type)
    if r.n_targets != 1 or r.vocab_stride != 1 or out.n_rows != r.n_rows or out.vocab != r.vocab or out.most < 1:
        raise ValueError("sparse rows are made of logits with adjacent columns and one target a row, in slots as many")
    for row in range(r.n_rows):
        if not 0 <= r.targets[row] < r.vocab:
            raise_bad_target(&r, row, 0)
    with nogil:
        if c_select_sparse(kernels[0], r, given, threads, out):
            found = c_count_entries(out)
    return found


def pack_sparse(object selected, int threads, object sparse):
    """Packs what select_sparse has left into `sparse` (KernelSparse), which has room for its entries.

    Raises:
        ValueError: an address of 0, or None.
    """
    cdef SelectedRows rows = parse_selected(selected)
    cdef SparseRows out = parse_sparse(sparse)
    with nogil:
        c_pack_sparse(rows, threads, out)


def sparse_times_table(
    object sparse, int logit_type, object table, int64_t stride, int64_t width, int threads, object out
):
    """out [rows, width] (float32) = sparse [rows, V] @ table [V, width], whose rows are `stride` elements apart.

    Raises:
        ValueError: an address of 0, or None; a float64 table.
    """
    cdef SparseRows rows = parse_sparse(sparse)
    cdef const void* given = <const void*>required(table, rows.vocab * width, "table")
    cdef float* result = <float*>required(out, rows.n_rows * width, "out")
    check_table(logit_type)
    with nogil:
        c_sparse_times_table(kernels[0], rows, logit_type, given, stride, width, threads, result)


def sparse_transposed_times_table(
    object sparse, int logit_type, object table, int64_t stride, int64_t width, bint add, int threads, object out
):
    """out [V, width] (float32) = sparse^T [V, rows] @ table [rows, width]; added to what is there with `add`.

    Raises:
        ValueError: as sparse_times_table.
    """
    cdef SparseRows rows = parse_sparse(sparse)
    cdef const void* given = <const void*>required(table, rows.n_rows * width, "table")
    cdef float* result = <float*>required(out, rows.vocab * width, "out")
    check_table(logit_type)
    with nogil:
        c_sparse_transposed_times_table(kernels[0], rows, logit_type, given, stride, width, add, threads, result)


def sparse_column_sums(object sparse, bint add, int threads, object out):
    """out [V] (float32) = the sum of the sparse rows; added to what is there with `add`.

    Raises:
        ValueError: as sparse_times_table.
    """
    cdef SparseRows rows = parse_sparse(sparse)
    cdef float* result = <float*>required(out, rows.vocab, "out")
    with nogil:
        c_sparse_column_sums(rows, add, threads, result)


set_isa(None)
