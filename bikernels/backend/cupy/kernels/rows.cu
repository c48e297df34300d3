// Reductions of rows, each by a team of threads.
//
// OPERATION: a struct below. ELEMENT, RESULT: dtypes of x and of the result (or any_dtype); ACCUMULATE: float or
// double. TEAM: a kind of team. KEPT: whether rows are read once and kept in shared memory. OCTETS: of a thread in a
// step, see row.cuh. THREADS: of a CTA, at most.
#include "row.cuh"
#include "softmax.cuh"

using A = ACCUMULATE;
constexpr bool IS_PRECISE = !is_same<RESULT, bfloat16>::value && !is_same<RESULT, float16>::value;
using Elements = A[THREAD_LANES];

// The arrays of an operation; null where it has none.
struct Arrays {
    void* out;
    const void* x;
    const void* grad;
    const void* weight;
    const void* bias;
    void* mean;
    void* rstd;
};

template <class Operation>
using RowOf = Row<TEAM, ELEMENT, RESULT, A, Operation::OPERANDS_KEPT, Operation::RESULTS_KEPT, OCTETS>;

// What most operations have in common.
struct OfX {
    static constexpr int OPERANDS_KEPT = KEPT;
    static constexpr bool RESULTS_KEPT = false;
    static __device__ __forceinline__ A absent() { return 0; }
};
struct OfXAndGrad : OfX {
    static constexpr int OPERANDS_KEPT = KEPT ? 2 : 0;
};

// ---------------------------------------------------------------------------------------------------------------- sums

// The sum of a row, or its mean: one pass, so that only short rows, of which a warp has many, are kept.
struct Mean : OfX {
    static constexpr int OPERANDS_KEPT = TEAM == LANES;

    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Arrays& arrays) {
        A sum = 0;
        if constexpr (R::IS_KEPT) {
            sum = row.sum(0, [&](auto i, Octet octet, Elements& v) { row.read_x(i, octet, v); });
        } else {
            row.for_chunks(0, row.team.chunks, [&](int chunk, int) {
                const A of_chunk =
                    sum_warp(row.x.sum_lanes(static_cast<long long>(chunk) * SUM_CHUNK + row.position, row.n));
                row.team.share(row.team.sums(0), chunk, of_chunk);
            });
            row.team.meet();
            if (row.team.warp > 0) return;
            sum = sum_shared(row.team.sums(0), row.team.chunks);
        }
        if (row.position == 0 && row.is_present) row.writer(arrays.out).write_one(sum / static_cast<A>(row.p.divisor));
    }
};

// The mean of y * y, y = x - mean, of which `mean` becomes that of x.
template <class R>
__device__ __forceinline__ A variance(const R& row, A& mean, A divisor) {
    const A n = static_cast<A>(row.p.n);
    mean = row.sum(0, [&](auto i, Octet octet, Elements& v) { row.read_x(i, octet, v); }) / n;
    const A m = mean;
    const A sum = row.sum(1, [&](auto i, Octet octet, Elements& v) {
        row.read_x(i, octet, v);
#pragma unroll
        for (int j = 0; j < THREAD_LANES; j++) {
            const A y = v[j] - m;
            v[j] = y * y;
        }
    });
    return sum / divisor;
}

struct Variance : OfX {
    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Arrays& arrays) {
        A mean;
        const A result = variance(row, mean, static_cast<A>(row.p.divisor));
        if (row.team.warp == 0 && row.position == 0 && row.is_present)
            row.writer(arrays.out).write_one(row.p.logarithm ? root(result) : result);
    }
};

// ------------------------------------------------------------------------------------------------------------- softmax

enum class Form { SOFTMAX, LOG_SOFTMAX, LOGSUMEXP };

template <Form FORM>
struct SoftmaxFamily : OfX {
    // Exponentials are kept where that leaves a multiprocessor enough rows, else computed twice.
    static constexpr bool RESULTS_KEPT = FORM == Form::SOFTMAX && TEAM != CLUSTER;

    static __device__ __forceinline__ A absent() { return lowest<A>(); }

    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Arrays& arrays) {
        using Stored = typename R::Stored;
        constexpr int VECTORS = R::VECTORS;
        const auto& team = row.team;

        Maximum<Stored, A> thread_maximum;  // it is exact, so its order is free
        row.for_octets([&](auto i, Octet octet) {
            uint4 raw[VECTORS];
            Elements v;
            row.read_x(i, octet, absent(), raw, v);
            thread_maximum.add(raw, v);
        });
        const A maximum = team.max_of_warps(team.max_in_warp(thread_maximum.value()));

        unsigned count = 0;
        const auto term = [&](auto i, Octet octet, Elements& v) {
            uint4 raw[VECTORS];
            row.read_x(i, octet, absent(), raw, v);
            if constexpr (RESULTS_KEPT) {
                Elements all;
                exponentials<IS_PRECISE, Stored>(raw, v, maximum, count, all);
                row.keep_results(octet, all);
            } else {
                exponentials<IS_PRECISE, Stored>(raw, v, maximum, count);
            }
        };
        const A sum = row.sum(0, term, [&] {
            count = team.sum_in_warp(count);
            team.share(team.counts, team.warp, count);
        });
        if constexpr (TEAM != LANES) count = team.sum_of_counts();
        const A normaliser = softmax_normaliser(static_cast<A>(count), sum, FORM != Form::SOFTMAX);

        const auto writer = row.writer(arrays.out);
        if constexpr (FORM == Form::LOGSUMEXP) {
            const bool is_infinite = maximum - maximum != 0 && maximum == maximum;
            if (team.warp == 0 && row.position == 0 && row.is_present)
                writer.write_one(is_infinite ? maximum : maximum + normaliser);
        } else if constexpr (FORM == Form::LOG_SOFTMAX) {
            row.for_octets([&](auto i, Octet octet) {
                Elements v;
                row.read_x(i, octet, v);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] - maximum - normaliser;
                writer.write(i, v);
            });
        } else {
            const A reciprocal = 1 / normaliser;
            const bool is_few = normaliser <= FEW;
            row.for_octets([&](auto i, Octet octet) {
                uint4 raw[VECTORS];
                Elements v;
                if constexpr (RESULTS_KEPT) {
                    row.read_results(octet, v);
                    divide(v, normaliser, reciprocal, is_few);
                    writer.write(i, v);
                    return;
                }
                row.read_x(i, octet, absent(), raw, v);
                quotients<IS_PRECISE, Stored>(raw, v, maximum, normaliser, reciprocal, is_few);
                writer.write(i, v);
            });
        }
    }
};

using Softmax = SoftmaxFamily<Form::SOFTMAX>;
using LogSoftmax = SoftmaxFamily<Form::LOG_SOFTMAX>;
using LogSumExp = SoftmaxFamily<Form::LOGSUMEXP>;

// x is the forward result y.
struct SoftmaxBackward : OfXAndGrad {
    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Arrays& arrays) {
        const A sum = row.sum(0, [&](auto i, Octet octet, Elements& v) {
            Elements y;
            row.read_x(i, octet, y);
            row.read_grad(arrays.grad, i, octet, v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] * y[j];
        });
        const auto writer = row.writer(arrays.out);
        row.for_octets([&](auto i, Octet octet) {
            Elements y, g;
            row.read_x(i, octet, y);
            row.read_grad(arrays.grad, i, octet, g);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) y[j] = y[j] * (g[j] - sum);
            writer.write(i, y);
        });
    }
};

struct LogSoftmaxBackward : OfXAndGrad {
    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Arrays& arrays) {
        const A sum = row.sum(0, [&](auto i, Octet octet, Elements& v) { row.read_grad(arrays.grad, i, octet, v); });
        const auto writer = row.writer(arrays.out);
        row.for_octets([&](auto i, Octet octet) {
            Elements y, g;
            row.read_x(i, octet, y);
            row.read_grad(arrays.grad, i, octet, g);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) g[j] = fused(-exponential(y[j], A(0)), sum, g[j]);
            writer.write(i, g);
        });
    }
};

// --------------------------------------------------------------------------------------------------------------- norms

template <class R>
__device__ __forceinline__ A reciprocal_root(const R& row, A mean_square) {
    return 1 / root(mean_square + static_cast<A>(row.p.eps));
}

// Write a statistic of the row, in the accumulate dtype, if the caller wants it.
template <int OPERAND, class R>
__device__ __forceinline__ void write_statistic(const R& row, void* to, A value) {
    if (to != nullptr && row.team.warp == 0 && row.position == 0 && row.is_present)
        store(static_cast<A*>(to) + row.p.template row_offset<OPERAND>(row.number), value);
}

// Reads a weight or a bias. SIMPLE: as vectors of the dtype of x.
template <bool SIMPLE, class Reader>
__device__ __forceinline__ void read_side(const Reader& reader, long long i, Elements& v) {
    if constexpr (SIMPLE) {
        reader.template read_vector<ELEMENT>(i, v);
    } else {
        reader.read(i, v);
    }
}

template <class Reader>
__device__ __forceinline__ bool is_simple(const Reader& reader) {
    return reader && reader.has_vectors_of(dtype_code<ELEMENT>::value);
}

struct RmsNorm : OfX {
    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Arrays& arrays) {
        const A sum = row.sum(0, [&](auto i, Octet octet, Elements& v) {
            row.read_x(i, octet, v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] * v[j];
        });
        const A r = reciprocal_root(row, sum / static_cast<A>(row.p.divisor));
        write_statistic<OF_RSTD>(row, arrays.rstd, r);

        const SideReader<A, OF_WEIGHT> weight(row.p, arrays.weight, row.number);
        if constexpr (!is_same<ELEMENT, any_dtype>::value) {
            if (is_simple(weight)) {
                write<true>(row, arrays, r, weight);
                return;
            }
        }
        write<false>(row, arrays, r, weight);
    }

  private:
    template <bool SIMPLE, class R>
    static __device__ __forceinline__ void write(const R& row, const Arrays& arrays, A r,
                                                 const SideReader<A, OF_WEIGHT>& weight) {
        const auto writer = row.writer(arrays.out);
        row.for_octets([&](auto i, Octet octet) {
            Elements v;
            row.read_x(i, octet, v);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] * r;
            if (SIMPLE || weight) {
                Elements w;
                read_side<SIMPLE>(weight, i, w);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] * w[j];
            }
            writer.write(i, v);
        });
    }
};

struct LayerNorm : OfX {
    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Arrays& arrays) {
        A mean;
        const A r = reciprocal_root(row, variance(row, mean, static_cast<A>(row.p.divisor)));
        write_statistic<OF_MEAN>(row, arrays.mean, mean);
        write_statistic<OF_RSTD>(row, arrays.rstd, r);

        const SideReader<A, OF_WEIGHT> weight(row.p, arrays.weight, row.number);
        const SideReader<A, OF_BIAS> bias(row.p, arrays.bias, row.number);
        if constexpr (!is_same<ELEMENT, any_dtype>::value) {
            if (is_simple(weight) && is_simple(bias)) {
                write<true>(row, arrays, mean, r, weight, bias);
                return;
            }
        }
        write<false>(row, arrays, mean, r, weight, bias);
    }

  private:
    template <bool SIMPLE, class R>
    static __device__ __forceinline__ void write(const R& row, const Arrays& arrays, A mean, A r,
                                                 const SideReader<A, OF_WEIGHT>& weight,
                                                 const SideReader<A, OF_BIAS>& bias) {
        const auto writer = row.writer(arrays.out);
        row.for_octets([&](auto i, Octet octet) {
            Elements v, w, b;
            row.read_x(i, octet, v);
            if (SIMPLE || weight) read_side<SIMPLE>(weight, i, w);
            if (SIMPLE || bias) read_side<SIMPLE>(bias, i, b);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) v[j] = (v[j] - mean) * r;
            if (SIMPLE || (weight && bias)) {
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) v[j] = fused(v[j], w[j], b[j]);
            } else if (weight) {
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] * w[j];
            } else if (bias) {
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] + b[j];
            }
            writer.write(i, v);
        });
    }
};

// The gradient with respect to x of rms_norm, or of layer_norm (CENTRED).
template <bool CENTRED>
struct NormBackward : OfXAndGrad {
    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Arrays& arrays) {
        const SideReader<A, OF_WEIGHT> weight(row.p, arrays.weight, row.number);
        const A r = SideReader<A, OF_RSTD>(row.p, arrays.rstd, row.number).read_one();
        A m = 0;
        if constexpr (CENTRED) m = SideReader<A, OF_MEAN>(row.p, arrays.mean, row.number).read_one();
        const A n = static_cast<A>(row.p.divisor);

        const auto read = [&](auto i, Octet octet, Elements& h, Elements& p) {
            row.read_x(i, octet, h);
            row.read_grad(arrays.grad, i, octet, p);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) h[j] = (CENTRED ? h[j] - m : h[j]) * r;
            if (weight) {
                Elements w;
                weight.read(i, w);
#pragma unroll
                for (int j = 0; j < THREAD_LANES; j++) p[j] = p[j] * w[j];
            }
        };
        A of_p = 0;
        if constexpr (CENTRED) {
            of_p = row.sum(0, [&](auto i, Octet octet, Elements& p) {
                Elements h;
                read(i, octet, h, p);
            }) / n;
        }
        const A of_ph = row.sum(1, [&](auto i, Octet octet, Elements& p) {
            Elements h;
            read(i, octet, h, p);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) p[j] = p[j] * h[j];
        }) / n;
        const auto writer = row.writer(arrays.out);
        row.for_octets([&](auto i, Octet octet) {
            Elements h, p;
            read(i, octet, h, p);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) p[j] = fused(-h[j], of_ph, CENTRED ? p[j] - of_p : p[j]) * r;
            writer.write(i, p);
        });
    }
};

using RmsNormBackward = NormBackward<false>;
using LayerNormBackward = NormBackward<true>;

// The gradient with respect to the weight: a row has the elements of the batch at one place of the normalised axes.
template <bool CENTRED>
struct WeightBackward : OfXAndGrad {
    template <class R>
    static __device__ __forceinline__ void run(const R& row, const Arrays& arrays) {
        const SideReader<A, OF_MEAN> mean(row.p, arrays.mean, row.number);
        const SideReader<A, OF_RSTD> rstd(row.p, arrays.rstd, row.number);
        const A sum = row.sum(0, [&](auto i, Octet octet, Elements& v) {
            Elements h, m, r;
            row.read_x(i, octet, h);
            row.read_grad(arrays.grad, i, octet, v);
            if constexpr (CENTRED) mean.read(i, m);
            rstd.read(i, r);
#pragma unroll
            for (int j = 0; j < THREAD_LANES; j++) v[j] = v[j] * ((CENTRED ? h[j] - m[j] : h[j]) * r[j]);
        });
        if (row.team.warp == 0 && row.position == 0 && row.is_present) row.writer(arrays.out).write_one(sum);
    }
};

using RmsNormWeightBackward = WeightBackward<false>;
using LayerNormWeightBackward = WeightBackward<true>;

// -------------------------------------------------------------------------------------------------------------- kernel

// Where TEAM is LANES: `lanes` threads have a row, and a warp `batch` times as many rows as it has such teams, one
// after the other; it begins to read all of them first. `kept`: bytes of dynamic shared memory for the elements of a
// warp at one time; what the team exchanges follows behind those of all warps.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    reduce_rows(const __grid_constant__ Reduction p, int lanes, int batch, int kept, void* out, const void* x,
                const void* grad, const void* weight, const void* bias, void* mean, void* rstd) {
    extern __shared__ __align__(16) unsigned char shared[];
    using R = RowOf<OPERATION>;
    const Arrays arrays{out, x, grad, weight, bias, mean, rstd};
    const int warps = blockDim.x / WARP;
    const Team<TEAM, A> team(lanes, p.n, shared + warps * kept);
    team.say_started();
    launch_dependents();  // they wait for this kernel's end
    wait_for_predecessors();
    if constexpr (TEAM == LANES) {
        const int rows = WARP / lanes, own = lane_id() / lanes;  // of a warp at a time
        const long long step = static_cast<long long>(gridDim.x) * warps * batch * rows;
        long long first = (static_cast<long long>(blockIdx.x) * warps + warp_id()) * batch * rows;
        uint4* const of_warp = reinterpret_cast<uint4*>(shared + warp_id() * batch * kept);
        for (; first < p.rows; first += step) {
#pragma unroll 1
            for (int i = 0; i < batch; i++) {
                const R row(p, team, first + i * rows + own, x, of_warp + i * kept / 16);
                row.load(grad, OPERATION::absent());
            }
            wait_for_rows();
#pragma unroll 1
            for (int i = 0; i < batch; i++) {
                const R row(p, team, first + i * rows + own, x, of_warp + i * kept / 16);
                OPERATION::run(row, arrays);
            }
        }
    } else {
        const long long teams = gridDim.x / team.ctas;
        uint4* const of_warp = reinterpret_cast<uint4*>(shared + warp_id() * kept);
        const long long team_number = blockIdx.x / team.ctas;
        for (long long first = team_number; first < p.rows; first += teams) {
            const R row(p, team, first, x, of_warp);
            row.load(grad, OPERATION::absent());
            wait_for_rows();
            if (first == team_number) team.wait_for_start();
            OPERATION::run(row, arrays);
            if (first + teams < p.rows) team.meet();  // shared memory is free for the next row
        }
    }
}
