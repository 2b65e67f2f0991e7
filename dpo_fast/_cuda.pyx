# cython: language_level=3
# distutils: language = c++
"""The CUDA kernels: a binding of the launchers in csrc/cuda.

The functions are those of `_cpu`, with `stream` (a cudaStream_t as an integer) and `device` in place of the number of
threads. Each puts its kernels on the stream and returns; nothing waits, copies or allocates. Arrays come as addresses
in that device's memory (0: absent). What depends on values is not checked here, because that would wait for the GPU:
an invalid target or pair gives NaN and reads nothing out of bounds.

`rows` is as in `_cpu`, with one more number at its end: whether the token weights are float64 (else float32). `seqs` is
(cu_seqlens, n_seqs, average, whether cu_seqlens are int64 (else int32)). `pairs` and `loss` are as in `_cpu`. Reference
log-probs come with `ref_double`: whether they are float64 (else float32).

What the CPU's backward works out again is kept by forward here, in `seq_saved` [n_seqs, SEQ_SAVED] (float64): by what a
sum of log-probs is multiplied, the derivative of the reduced loss, and what the loss reads of a sequence.
"""

import ctypes

from libc.stdint cimport int32_t, int64_t, uint8_t, uintptr_t


cdef extern from "cuda_runtime_api.h" nogil:
    ctypedef int cudaError_t
    int cudaErrorInsufficientDriver
    int cudaErrorNoKernelImageForDevice
    const char* cudaGetErrorName(cudaError_t)
    const char* cudaGetErrorString(cudaError_t)
    cudaError_t cudaGetLastError()
    cudaError_t cudaGetDevice(int*)
    cudaError_t cudaSetDevice(int)
    cudaError_t cudaRuntimeGetVersion(int*)


cdef extern from "cuda/launch.h" namespace "dpo_fast" nogil:
    cdef struct LogitTransform:
        double logit_scale, temperature, softcap

    cdef struct TokenArrays:
        void* logps
        void* stats
        void* entropy
        void* mean_logits
        uint8_t* is_top1
        void* log_sum_sq_probs

    cdef struct GradTensor:
        char* data
        int64_t seq_stride, row_stride, vocab_stride

    const int kMaxLossTerms, kLossTypes, kDivergences, kLengths, kSeqSaved
    int loss_flags(int)

    cdef struct LossOptions:
        int n_terms
        int* types
        double* weights
        double beta, label_smoothing, discopop_tau, simpo_gamma
        int divergence
        double alpha, desirable_weight, undesirable_weight, baseline, tokens_per_pair
        bint average

    cdef struct CudaRows:
        const void* logits
        const int64_t* targets
        const uint8_t* row_mask
        const void* weights
        LogitTransform transform
        int64_t seq_stride, row_stride, vocab_stride
        int64_t rows_per_seq, n_rows, vocab, n_targets, ignore_index
        int32_t logit_type, weights_double

    cdef struct CudaSeqs:
        const void* cu_seqlens
        int64_t n_seqs
        int32_t cu_int64, average

    cdef struct CudaPairs:
        const int64_t* pairs
        int64_t n_pairs
        const double* weights
        const double* baseline
        double divisor

    cdef struct CudaLosses:
        void* loss
        void* losses
        void* chosen_rewards
        void* rejected_rewards
        double* pair_grads

    cdef struct CudaGrads:
        const void* token_logps
        const void* token_entropy
        const void* seq_logps
        const void* loss
        const void* losses


cdef extern from "cuda/launch.h" nogil:
    int64_t dpo_fast_forward_scratch_bytes(const CudaRows*)
    int dpo_fast_forward(const CudaRows*, const TokenArrays*, void*, void*)
    int dpo_fast_sequences(const CudaRows*, const CudaSeqs*, const void*, void*, int, double*, void*)
    int dpo_fast_sequences_and_losses(
        const CudaRows*, const CudaSeqs*, const CudaPairs*, const LossOptions*, const TokenArrays*, const void*, int,
        void*, double*, const CudaLosses*, void*)
    int dpo_fast_losses(
        const CudaPairs*, const LossOptions*, int, int64_t, const void*, const void*, int, const double*,
        const CudaLosses*, void*)
    int dpo_fast_losses_backward(
        const CudaPairs*, int, int64_t, const double*, const void*, const void*, void*, void*)
    int dpo_fast_backward(
        const CudaRows*, const CudaSeqs*, const CudaPairs*, const TokenArrays*, const double*, const double*,
        const CudaGrads*, const GradTensor*, double*, void*)


cdef extern from *:
    """
    #ifndef DPO_FAST_CUDA_ARCHS
    #define DPO_FAST_CUDA_ARCHS ""
    #endif
    """
    const char* DPO_FAST_CUDA_ARCHS


SEQ_SAVED = kSeqSaved


def archs():
    """The architectures that the kernels were compiled for, such as ["sm_90", "compute_120"]; compute: as PTX."""
    return DPO_FAST_CUDA_ARCHS.decode().split()


def runtime_version():
    """The CUDA runtime's version, as (major, minor)."""
    cdef int version = 0
    check(cudaRuntimeGetVersion(&version))
    return version // 1000, version % 1000 // 10


def driver_version():
    """The newest CUDA version that the installed driver serves, as (major, minor); (0, 0) without a driver.

    Asked of the driver itself: the runtime says 0, too, for one that it cannot work with.
    """
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0, 0
    return version.value // 1000, version.value % 1000 // 10


cdef int check(int status) except -1:
    """Raises RuntimeError, with CUDA's text and, where there is one, the way out."""
    if status == 0:
        return 0
    cudaGetLastError()  # otherwise the next launch, which looks there, would be blamed
    text = f"CUDA error {cudaGetErrorName(<cudaError_t>status).decode()}: {cudaGetErrorString(<cudaError_t>status).decode()}"
    build = "DPO_FAST_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir --no-binary dpo_fast dpo_fast"
    if status == cudaErrorInsufficientDriver:
        (major, minor), driver = runtime_version(), driver_version()
        found = f"serves CUDA {driver[0]}.{driver[1]}" if driver[0] else "is absent"
        release = " (release 580 or later)" if major == 13 else ""
        raise RuntimeError(
            f"{text}. The NVIDIA driver {found}; this build of dpo_fast needs one for CUDA {major}.{minor}{release}: "
            f"update the driver, or build dpo_fast from source with an nvcc that it serves, such as that of CUDA 12 ({build})"
        )
    if status == cudaErrorNoKernelImageForDevice:
        raise RuntimeError(
            f"{text}. This build of dpo_fast has kernels for {', '.join(archs())}, none of which this GPU runs: "
            f"build dpo_fast from source with DPO_FAST_CUDA_ARCHS naming its compute capability, such as 75 ({build})"
        )
    raise RuntimeError(text)


cdef class _OnDevice:
    """Makes a device current for a `with` block."""

    cdef int device, before

    def __cinit__(self, int device):
        self.device = device
        self.before = device

    def __enter__(self):
        check(cudaGetDevice(&self.before))
        if self.before != self.device:
            check(cudaSetDevice(self.device))

    def __exit__(self, *error):
        if self.before != self.device:
            check(cudaSetDevice(self.before))


cdef int refuse_null(uintptr_t address, int64_t count, str name) except -1:
    if address == 0 and count > 0:
        raise ValueError(f"{name} has no memory (a fake or meta tensor?)")
    return 0


cdef CudaRows make_rows(tuple spec) except *:
    cdef CudaRows rows
    cdef int64_t n_seqs
    cdef uintptr_t logits, targets, row_mask, weights
    (rows.logit_type, n_seqs, rows.rows_per_seq, rows.vocab, rows.seq_stride, rows.row_stride, rows.vocab_stride,
     rows.n_targets, rows.ignore_index, rows.transform.temperature, rows.transform.logit_scale, rows.transform.softcap,
     logits, targets, row_mask, weights, rows.weights_double) = spec
    rows.n_rows = n_seqs * rows.rows_per_seq
    refuse_null(logits, rows.n_rows, "logits")
    refuse_null(targets, rows.n_rows * rows.n_targets, "targets")
    rows.logits = <const void*>logits
    rows.targets = <const int64_t*>targets
    rows.row_mask = <const uint8_t*>row_mask
    rows.weights = <const void*>weights
    return rows


cdef CudaSeqs make_seqs(tuple spec) except *:
    cdef CudaSeqs seqs
    cdef uintptr_t cu_seqlens
    cu_seqlens, seqs.n_seqs, seqs.average, seqs.cu_int64 = spec
    seqs.cu_seqlens = <const void*>cu_seqlens
    return seqs


cdef CudaPairs make_pairs(tuple spec, int64_t n_seqs) except *:
    cdef CudaPairs pairs
    cdef uintptr_t address, weights, baseline
    address, pairs.n_pairs, weights, baseline, pairs.divisor = spec
    pairs.pairs = <const int64_t*>address
    pairs.weights = <const double*>weights
    pairs.baseline = <const double*>baseline
    if pairs.divisor == 0:
        pairs.divisor = pairs.n_pairs
    if pairs.pairs == NULL and 2 * pairs.n_pairs > n_seqs:
        raise ValueError(f"{pairs.n_pairs} pairs need {2 * pairs.n_pairs} sequences, found {n_seqs}")
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
    options.baseline = 0
    for i in range(options.n_terms):
        options.types[i] = types[i]
        options.weights[i] = weights[i]
        if not 0 <= options.types[i] < kLossTypes:
            raise ValueError(f"there is no loss number {options.types[i]}")
    return options


cdef TokenArrays make_arrays(const CudaRows* rows, uintptr_t logps, uintptr_t stats) except *:
    cdef TokenArrays out
    refuse_null(logps, rows.n_rows * rows.n_targets, "logps")
    refuse_null(stats, rows.n_rows, "stats")
    out.logps = <void*>logps
    out.stats = <void*>stats
    out.entropy = NULL
    out.mean_logits = NULL
    out.is_top1 = NULL
    out.log_sum_sq_probs = NULL
    return out


cdef CudaLosses make_losses(
    int64_t n_pairs, uintptr_t loss, uintptr_t losses, uintptr_t chosen_rewards, uintptr_t rejected_rewards,
    uintptr_t pair_grads,
) except *:
    cdef CudaLosses out
    refuse_null(loss, 1, "loss")
    refuse_null(losses, n_pairs, "losses")
    refuse_null(chosen_rewards, n_pairs, "chosen_rewards")
    refuse_null(rejected_rewards, n_pairs, "rejected_rewards")
    refuse_null(pair_grads, n_pairs, "pair_grads")
    out.loss = <void*>loss
    out.losses = <void*>losses
    out.chosen_rewards = <void*>chosen_rewards
    out.rejected_rewards = <void*>rejected_rewards
    out.pair_grads = <double*>pair_grads
    return out


def forward_scratch_bytes(tuple rows):
    """How many bytes of scratch the forward functions need for these rows; 0: none."""
    cdef CudaRows r = make_rows(rows)
    return dpo_fast_forward_scratch_bytes(&r)


cdef TokenArrays make_outputs(const CudaRows* rows, uintptr_t scratch, uintptr_t logps, uintptr_t stats) except *:
    refuse_null(scratch, dpo_fast_forward_scratch_bytes(rows), "scratch")
    return make_arrays(rows, logps, stats)


cdef int run_forward(const CudaRows* rows, const TokenArrays* out, uintptr_t scratch, uintptr_t stream) except -1:
    return check(dpo_fast_forward(rows, out, <void*>scratch, <void*>stream))


def token_forward(
    tuple rows, uintptr_t stream, int device, uintptr_t scratch, uintptr_t logps, uintptr_t stats, uintptr_t entropy,
    uintptr_t mean_logits, uintptr_t is_top1, uintptr_t log_sum_sq_probs,
):
    """Fills logps [rows, n_targets], stats [rows, 2] and those of the other outputs that are not 0."""
    cdef CudaRows r = make_rows(rows)
    cdef TokenArrays out = make_outputs(&r, scratch, logps, stats)
    out.entropy = <void*>entropy
    out.mean_logits = <void*>mean_logits
    out.is_top1 = <uint8_t*>is_top1
    out.log_sum_sq_probs = <void*>log_sum_sq_probs
    with _OnDevice(device):
        run_forward(&r, &out, scratch, stream)


def sequence_forward(
    tuple rows, tuple seqs, uintptr_t stream, int device, uintptr_t scratch, uintptr_t logps, uintptr_t stats,
    uintptr_t seq_logps, bint double_sums, uintptr_t seq_saved,
):
    """Fills logps [rows], stats [rows, 2], seq_logps [n_seqs] (float64 with double_sums) and seq_saved."""
    cdef CudaRows r = make_rows(rows)
    cdef CudaSeqs q = make_seqs(seqs)
    cdef TokenArrays out = make_outputs(&r, scratch, logps, stats)
    refuse_null(seq_logps, q.n_seqs, "seq_logps")
    refuse_null(seq_saved, q.n_seqs, "seq_saved")
    with _OnDevice(device):
        run_forward(&r, &out, scratch, stream)
        check(dpo_fast_sequences(
            &r, &q, <const void*>logps, <void*>seq_logps, double_sums, <double*>seq_saved, <void*>stream))


def dpo_forward(
    tuple rows, tuple seqs, tuple pairs_spec, tuple loss_spec, uintptr_t stream, int device, uintptr_t scratch,
    bint wpo, uintptr_t ref_logps, bint ref_double, uintptr_t logps, uintptr_t stats, uintptr_t entropy,
    uintptr_t mean_logits, uintptr_t is_top1, uintptr_t log_sum_sq_probs, uintptr_t seq_logps, uintptr_t loss,
    uintptr_t losses, uintptr_t chosen_rewards, uintptr_t rejected_rewards, uintptr_t pair_grads, uintptr_t seq_saved,
):
    """Fills logps [rows], stats [rows, 2], the other statistics of tokens [rows] that are not 0 (with wpo,
    log_sum_sq_probs has to be there), seq_logps [n_seqs], loss [], losses and rewards [n_pairs], pair_grads
    [n_pairs, 2] (float64, the derivatives of each pair's loss with respect to its two log-probs) and seq_saved."""
    cdef CudaRows r = make_rows(rows)
    cdef CudaSeqs q = make_seqs(seqs)
    cdef CudaPairs p = make_pairs(pairs_spec, q.n_seqs)
    cdef LossOptions options = make_loss(loss_spec)
    cdef TokenArrays out = make_outputs(&r, scratch, logps, stats)
    cdef CudaLosses results = make_losses(p.n_pairs, loss, losses, chosen_rewards, rejected_rewards, pair_grads)
    refuse_null(seq_logps, q.n_seqs, "seq_logps")
    refuse_null(seq_saved, q.n_seqs, "seq_saved")
    if wpo:
        refuse_null(log_sum_sq_probs, r.n_rows, "log_sum_sq_probs")
    out.entropy = <void*>entropy
    out.mean_logits = <void*>mean_logits
    out.is_top1 = <uint8_t*>is_top1
    out.log_sum_sq_probs = <void*>(log_sum_sq_probs if wpo else 0)
    with _OnDevice(device):
        run_forward(&r, &out, scratch, stream)
        check(dpo_fast_sequences_and_losses(
            &r, &q, &p, &options, &out, <const void*>ref_logps, ref_double, <void*>seq_logps, <double*>seq_saved,
            &results, <void*>stream))


def backward(
    tuple rows, tuple seqs, tuple pairs_spec, uintptr_t stream, int device, uintptr_t scratch, uintptr_t logps,
    uintptr_t stats, uintptr_t entropy, uintptr_t seq_saved, uintptr_t pair_grads, uintptr_t grad_token_logps,
    uintptr_t grad_entropy, uintptr_t grad_seq_logps, uintptr_t grad_loss, uintptr_t grad_losses,
    uintptr_t grad_logits, int64_t grad_seq_stride, int64_t grad_row_stride, int64_t grad_vocab_stride,
):
    """Fills grad_logits (which may be the logits) from what forward left and the incoming gradients of the token
    log-probs and entropy, of the sequence log-probs (with `seqs`), and of the loss (with `pairs_spec`).

    seq_saved is read with `seqs`; pair_grads and scratch (float64 [n_seqs]) only with grad_losses."""
    cdef CudaRows r = make_rows(rows)
    cdef TokenArrays saved = make_arrays(&r, logps, stats)
    cdef CudaSeqs q
    cdef CudaPairs p
    cdef CudaGrads grads
    cdef GradTensor out
    refuse_null(grad_logits, r.n_rows, "grad_logits")
    if grad_entropy:
        refuse_null(entropy, r.n_rows, "entropy")
    if seqs is not None:
        q = make_seqs(seqs)
        refuse_null(seq_saved, q.n_seqs, "seq_saved")
        if pairs_spec is not None:
            p = make_pairs(pairs_spec, q.n_seqs)
    if grad_losses:
        if seqs is None or pairs_spec is None:
            raise ValueError("grad_losses needs seqs and pairs")
        refuse_null(pair_grads, p.n_pairs, "pair_grads")
        refuse_null(scratch, q.n_seqs, "scratch")
    saved.entropy = <void*>entropy
    grads.token_logps = <const void*>grad_token_logps
    grads.token_entropy = <const void*>grad_entropy
    grads.seq_logps = <const void*>grad_seq_logps
    grads.loss = <const void*>grad_loss
    grads.losses = <const void*>grad_losses
    out.data = <char*>grad_logits
    out.seq_stride = grad_seq_stride
    out.row_stride = grad_row_stride
    out.vocab_stride = grad_vocab_stride
    with _OnDevice(device):
        check(dpo_fast_backward(
            &r, &q if seqs is not None else NULL, &p if pairs_spec is not None else NULL, &saved,
            <const double*>seq_saved, <const double*>pair_grads, &grads, &out, <double*>scratch, <void*>stream))


def preference_forward(
    tuple pairs_spec, tuple loss_spec, bint wide, int64_t n_seqs, uintptr_t stream, int device, uintptr_t logps,
    uintptr_t ref_logps, bint ref_double, uintptr_t lengths, uintptr_t loss, uintptr_t losses,
    uintptr_t chosen_rewards, uintptr_t rejected_rewards, uintptr_t pair_grads,
):
    """As the end of dpo_forward, from logps [n_seqs] of float32, or float64 if `wide`, and the lengths [n_seqs]
    (float64) where the loss reads them."""
    cdef CudaPairs p = make_pairs(pairs_spec, n_seqs)
    cdef LossOptions options = make_loss(loss_spec)
    cdef CudaLosses results = make_losses(p.n_pairs, loss, losses, chosen_rewards, rejected_rewards, pair_grads)
    refuse_null(logps, n_seqs, "logps")
    if any(loss_flags(t) & kLengths for t in loss_spec[0]):
        refuse_null(lengths, n_seqs, "lengths")
    with _OnDevice(device):
        check(dpo_fast_losses(
            &p, &options, wide, n_seqs, <const void*>logps, <const void*>ref_logps, ref_double,
            <const double*>lengths, &results, <void*>stream))


def preference_backward(
    tuple pairs_spec, bint wide, int64_t n_seqs, uintptr_t stream, int device, uintptr_t pair_grads,
    uintptr_t grad_loss, uintptr_t grad_losses, uintptr_t grad_logps,
):
    """Fills grad_logps [n_seqs] from the incoming gradients of loss and losses (0: none)."""
    cdef CudaPairs p = make_pairs(pairs_spec, n_seqs)
    refuse_null(pair_grads, p.n_pairs, "pair_grads")
    refuse_null(grad_logps, n_seqs, "grad_logps")
    with _OnDevice(device):
        check(dpo_fast_losses_backward(
            &p, wide, n_seqs, <const double*>pair_grads, <const void*>grad_loss, <const void*>grad_losses,
            <void*>grad_logps, <void*>stream))
