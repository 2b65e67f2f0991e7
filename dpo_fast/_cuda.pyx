# cython: language_level=3
# distutils: language = c++
"""The CUDA kernels: a binding of the launchers in csrc/cuda.

The functions are those of `_cpu`, with `place`, a cudaStream_t and a device as integers, instead of the number of
threads. Each puts its kernels on the stream and returns; nothing waits, copies or allocates. Arrays come as addresses
in that device's memory, in the NamedTuples of dpo_fast/_arguments.py. Values are not checked here, because that would
wait for the GPU: an invalid target or pair gives NaN and reads nothing out of bounds.

`seq_saved` [n_seqs, SEQ_SAVED] (float64) holds the numbers that the CPU's backward works out again; forward always
writes it. `scratch` is memory that a call needs while it runs: `forward_scratch_bytes` of it in the forward functions.
Pairs that are named come with `order` and `offsets` wherever gradients of pairs add up to gradients of sequences.
"""

import ctypes

from libc.stdint cimport int64_t, uint8_t, uintptr_t

from dpo_fast._declarations cimport *


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
    const int kSeqSaved


cdef extern from "cuda/launch.h" nogil:
    int64_t dpo_fast_forward_scratch_bytes(const Rows*)
    int dpo_fast_forward(const Rows*, const TokenArrays*, void*, void*)
    int dpo_fast_sequences(const Rows*, const Sequences*, const void*, void*, int, double*, void*)
    int dpo_fast_sequences_and_losses(
        const Rows*, const Sequences*, const Pairs*, const LossOptions*, const TokenArrays*, int, const void*, int,
        void*, double*, const Losses*, void*)
    int dpo_fast_losses(
        const Pairs*, const LossOptions*, int, int, int64_t, const void*, const void*, int, const double*,
        const Losses*, void*)
    int dpo_fast_losses_backward(const Pairs*, int, int64_t, const double*, const Grads*, void*, void*)
    int dpo_fast_backward(
        const Rows*, const Sequences*, const Pairs*, const TokenArrays*, const double*, const double*, const Grads*,
        const GradTensor*, double*, void*)


include "_parse.pxi"


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
    name, what = cudaGetErrorName(<cudaError_t>status).decode(), cudaGetErrorString(<cudaError_t>status).decode()
    text = f"CUDA error {name}: {what}"
    build = "DPO_FAST_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir --no-binary dpo_fast dpo_fast"
    if status == cudaErrorInsufficientDriver:
        (major, minor), driver = runtime_version(), driver_version()
        found = f"serves CUDA {driver[0]}.{driver[1]}" if driver[0] else "is absent"
        release = " (release 580 or later)" if major == 13 else ""
        raise RuntimeError(
            f"{text}. The NVIDIA driver {found}; this build of dpo_fast needs one for CUDA {major}.{minor}{release}: "
            f"update the driver, or build dpo_fast from source with an nvcc that it serves, such as that of CUDA 12 "
            f"({build})"
        )
    if status == cudaErrorNoKernelImageForDevice:
        raise RuntimeError(
            f"{text}. This build of dpo_fast has kernels for {', '.join(archs())}, none of which this GPU runs: "
            f"build dpo_fast from source with DPO_FAST_CUDA_ARCHS naming its compute capability, such as 75 ({build})"
        )
    raise RuntimeError(text)


cdef class _Place:
    """A stream, whose device a `with` block makes the current one."""

    cdef void* stream
    cdef int device, before

    def __cinit__(self, object place):
        cdef uintptr_t stream
        stream, self.device = fields(place, "place")
        self.stream = <void*>stream
        self.before = self.device

    def __enter__(self):
        check(cudaGetDevice(&self.before))
        if self.before != self.device:
            check(cudaSetDevice(self.device))

    def __exit__(self, *error):
        if self.before != self.device:
            check(cudaSetDevice(self.before))


cdef void* parse_scratch(object scratch, int64_t n_bytes) except? NULL:
    return <void*>(required(scratch, n_bytes, "scratch") if n_bytes > 0 else 0)


cdef Pairs parse_sorted_pairs(object arguments, int64_t n_seqs) except *:
    """Pairs whose gradients add up to those of their sequences.

    Raises:
        ValueError: as parse_pairs, and pairs that are named without their order by sequence.
    """
    cdef Pairs pairs = parse_pairs(arguments, n_seqs)
    if pairs.pairs != NULL and (pairs.order == NULL or pairs.offsets == NULL):
        raise ValueError("order and offsets must be given with pairs, found None")
    return pairs


cdef Losses parse_all_losses(object arguments, int64_t n_pairs) except *:
    """Results of the losses, with pair_grads."""
    cdef Losses out = parse_losses(arguments, n_pairs)
    if n_pairs > 0 and out.pair_grads == NULL:
        raise ValueError("pair_grads must be given, found None")
    return out


def forward_scratch_bytes(object rows):
    """How many bytes of scratch the forward functions need for these rows; 0: none."""
    cdef Rows r = parse_rows(rows)
    return dpo_fast_forward_scratch_bytes(&r)


def token_forward(object rows, object place, object scratch, object logps, object stats, object statistics):
    """Fills logps [rows, n_targets], stats [rows, 2], which backward reads (None: no backward), and those of
    `statistics` (an address or None for each of `token_statistics()`, or None) that are wanted, [rows] each, is_top1
    [rows, n_targets].

    Raises:
        ValueError: an address of 0, or None, where there has to be an array.
        RuntimeError: CUDA's, also in the other functions.
    """
    cdef Rows r = parse_rows(rows)
    cdef TokenArrays tokens = parse_tokens(&r, logps, stats, statistics)
    cdef void* memory = parse_scratch(scratch, dpo_fast_forward_scratch_bytes(&r))
    cdef _Place at = _Place(place)
    with at:
        check(dpo_fast_forward(&r, &tokens, memory, at.stream))


def sequence_forward(
    object rows, object seqs, object place, object scratch, object logps, object stats, object seq_logps,
    bint double_sums, object seq_saved,
):
    """Fills logps [rows], stats [rows, 2] (if not None), seq_logps [n_seqs] (float64 with double_sums) and seq_saved.

    Raises:
        ValueError: as token_forward.
    """
    cdef Rows r = parse_rows(rows)
    cdef Sequences q = parse_sequences(seqs, &r)
    cdef TokenArrays tokens = parse_tokens(&r, logps, stats, None)
    cdef void* memory = parse_scratch(scratch, dpo_fast_forward_scratch_bytes(&r))
    cdef void* sums = <void*>required(seq_logps, q.n_seqs, "seq_logps")
    cdef double* saved = <double*>required(seq_saved, q.n_seqs, "seq_saved")
    cdef _Place at = _Place(place)
    with at:
        check(dpo_fast_forward(&r, &tokens, memory, at.stream))
        check(dpo_fast_sequences(&r, &q, tokens.logps, sums, double_sums, saved, at.stream))


def dpo_forward(
    object rows, object seqs, object pairs, object loss, object place, object scratch, bint wpo, object ref_logps,
    bint ref_double, object logps, object stats, object statistics, object seq_logps, object losses, object seq_saved,
):
    """Fills logps [rows], stats [rows, 2] (if not None) and statistics [rows] as token_forward, seq_logps [n_seqs], the
    arrays of `losses` and seq_saved. ref_logps [n_seqs] are float32, or float64 with ref_double, or None. With wpo,
    log_sum_sq_probs has to be among the statistics.

    Raises:
        ValueError: as sequence_forward, and pairs that are named without order and offsets.
    """
    cdef Rows r = parse_rows(rows)
    cdef Sequences q = parse_sequences(seqs, &r)
    cdef Pairs p = parse_sorted_pairs(pairs, q.n_seqs)
    cdef LossOptions options = parse_loss(loss)
    cdef void* memory = parse_scratch(scratch, dpo_fast_forward_scratch_bytes(&r))
    cdef const void* ref = <const void*>optional(ref_logps, q.n_seqs, "ref_logps")
    cdef TokenArrays tokens = parse_tokens(&r, logps, stats, statistics)
    cdef void* sums = <void*>required(seq_logps, q.n_seqs, "seq_logps")
    cdef Losses out = parse_all_losses(losses, p.n_pairs)
    cdef double* saved = <double*>required(seq_saved, q.n_seqs, "seq_saved")
    cdef _Place at = _Place(place)
    if wpo and r.n_rows > 0 and tokens.statistics[kStatistic_log_sum_sq_probs] == NULL:
        raise ValueError("log_sum_sq_probs must be given with wpo, found None")
    with at:
        check(dpo_fast_forward(&r, &tokens, memory, at.stream))
        check(dpo_fast_sequences_and_losses(
            &r, &q, &p, &options, &tokens, wpo, ref, ref_double, sums, saved, &out, at.stream))


def backward(rows, seqs, pairs, place, scratch, saved, grads, out):
    """Fills the gradient of the logits (which may be the logits) from what forward left and the incoming gradients of
    tokens, of the sequence log-probs (with `seqs`), and of the losses (with `seqs` and `pairs`, else None).

    seq_saved is read with `seqs`; the order of the pairs, pair_grads and scratch (float64 [n_seqs]) only with a
    gradient of `losses`, which costs one launch more.

    Raises:
        ValueError: as dpo_forward.
    """
    cdef Rows r = parse_rows(rows)
    cdef Sequences q
    cdef Pairs p
    cdef int64_t n_seqs = -1, n_pairs = -1
    cdef bint with_seqs = seqs is not None, with_pairs = seqs is not None and pairs is not None
    cdef const double* from_seqs = NULL
    cdef const double* pair_derivatives = NULL
    cdef double* memory = NULL
    logps, stats, entropy, pair_grads, seq_saved = fields(saved, "saved")
    cdef TokenArrays tokens = parse_tokens(&r, logps, required(stats, r.n_rows, "stats"), None)
    cdef GradTensor grad_logits = parse_out(out, &r)
    cdef _Place at = _Place(place)
    if with_seqs:
        q = parse_sequences(seqs, &r)
        n_seqs = q.n_seqs
        from_seqs = <const double*>required(seq_saved, n_seqs, "seq_saved")
    if with_pairs:
        p = parse_pairs(pairs, n_seqs)
        n_pairs = p.n_pairs
    cdef Grads incoming = parse_grads(grads, &r, n_seqs, n_pairs)
    if incoming.losses != NULL:
        p = parse_sorted_pairs(pairs, n_seqs)
        pair_derivatives = <const double*>required(pair_grads, n_pairs, "pair_grads")
        memory = <double*>parse_scratch(scratch, 8 * n_seqs)
    if incoming.statistics[kStatistic_entropy] != NULL:
        tokens.statistics[kStatistic_entropy] = <void*>required(entropy, r.n_rows, "entropy")
    with at:
        check(dpo_fast_backward(
            &r, &q if with_seqs else NULL, &p if with_pairs else NULL, &tokens, from_seqs, pair_derivatives, &incoming,
            &grad_logits, memory, at.stream))


def preference_forward(
    object pairs, object loss, bint wide, bint round_sums, int64_t n_seqs, object place, object logps,
    object ref_logps, bint ref_double, object lengths, object losses,
):
    """As the end of dpo_forward, from logps [n_seqs] of float32, or float64 if `wide`, and the lengths [n_seqs]
    (float64) where the loss reads them. round_sums: the logps are sums for logits of a type below float64, and are
    rounded to float32 where ref_logps are float32.

    Raises:
        ValueError: as token_forward.
    """
    cdef Pairs p = parse_pairs(pairs, n_seqs)
    cdef LossOptions options = parse_loss(loss)
    cdef const void* values = <const void*>required(logps, n_seqs, "logps")
    cdef const void* ref = <const void*>optional(ref_logps, n_seqs, "ref_logps")
    cdef const double* tokens = <const double*>optional(lengths, n_seqs, "lengths")
    cdef Losses out = parse_all_losses(losses, p.n_pairs)
    cdef _Place at = _Place(place)
    if reads_lengths(options):
        required(lengths, n_seqs, "lengths")
    with at:
        check(dpo_fast_losses(
            &p, &options, wide, round_sums, n_seqs, values, ref, ref_double, tokens, &out, at.stream))


def preference_backward(
    object pairs, bint wide, int64_t n_seqs, object place, object pair_grads, object grad_loss, object grad_losses,
    object grad_logps,
):
    """Fills grad_logps [n_seqs] from the incoming gradients of loss and losses (None: none).

    Raises:
        ValueError: as token_forward, and pairs that are named without order and offsets.
    """
    cdef Pairs p = parse_sorted_pairs(pairs, n_seqs)
    cdef const double* derivatives = <const double*>required(pair_grads, p.n_pairs, "pair_grads")
    cdef Grads grads = no_grads()
    cdef void* out = <void*>required(grad_logps, n_seqs, "grad_logps")
    cdef _Place at = _Place(place)
    grads.loss = <const void*>optional(grad_loss, 1, "grad_loss")
    grads.losses = <const void*>optional(grad_losses, p.n_pairs, "grad_losses")
    with at:
        check(dpo_fast_losses_backward(&p, wide, n_seqs, derivatives, &grads, out, at.stream))
