# cython: language_level=3
"""The structs and tables of csrc that the bindings _cpu.pyx and _cuda.pyx share."""

from libc.stdint cimport int32_t, int64_t, uint8_t


cdef extern from "sequence_math.h" namespace "dpo_fast" nogil:
    const int kLogitTypes, kStatistics, kLossParameters, kPairNumbers, kMaxLossTerms, kLossTypes
    const int kDivergences, kLogitOptions, kFloat64
    const int kStatistic_entropy, kStatistic_log_sum_sq_probs

    cdef struct LogitOptionTraits:
        const char* name
        bint is_whole

    cdef struct StatisticTraits:
        const char* name
        bint has_gradient

    LogitOptionTraits logit_option_traits(int)
    StatisticTraits statistic_traits(int)
    const char* loss_parameter_name(int)
    const char* pair_number_name(int)
    const char* loss_name(int)
    int loss_flags(int)

    cdef struct Rows:
        const void* logits
        const int64_t* targets
        const uint8_t* row_mask
        const void* weights
        int64_t seq_stride, row_stride, vocab_stride
        int64_t rows_per_seq, n_rows, n_targets, width, vocab
        int32_t logit_type, weights_double

    cdef struct TokenArrays:
        void* logps
        void* stats
        void** statistics  # an array of kStatistics

    cdef struct Sequences:
        const void* cu_seqlens
        int64_t n_seqs
        int32_t cu_int64, average

    cdef struct Pairs:
        const int64_t* pairs
        int64_t n_pairs
        const double** numbers  # an array of kPairNumbers
        const double* baseline
        double divisor
        const int64_t* order
        const int64_t* offsets

    cdef struct Losses:
        void* loss
        void* losses
        void* chosen_rewards
        void* rejected_rewards
        double* pair_grads

    cdef struct Grads:
        const void* token_logps
        const void** statistics  # an array of kStatistics
        const void* seq_logps
        const void* loss
        const void* losses

    cdef struct GradTensor:
        char* data
        int64_t seq_stride, row_stride, vocab_stride

    cdef struct LossOptions:
        int n_terms
        int* types  # arrays of kMaxLossTerms
        double* weights
        int divergence
        double baseline
        bint average

    void set_logit_option(Rows&, int, int64_t, double)
    void set_loss_parameter(LossOptions&, int, double)
    bint reads_lengths(const LossOptions&)
    int64_t seq_bound(const Sequences&, int64_t)
