// The losses' passes over logits on the CPU: each row is read once per pass, in blocks that stay in
// the first-level cache. Plain C interface, no torch header: compiles in two seconds.
//
// Legend: s, z student and teacher logits; i = (1 - t) s + t z; m a maximum. Sums of exponentials
// are relative to the maximum so far and rescaled when it rises; a block's sums are fp32 in vector
// lanes, a row's are double. What each pass computes is defined by forms.py and mixtures.py.
//
// Compiled without fast-math: NaN must reach the sums, and equal p and q must give a gradient of
// exactly 0 (no contraction of a - b * c).

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int BLOCK = 512;
constexpr float FLOOR = -1e30f;  // stands for -inf, see shards.py
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float TINY = 1e-37f;  // see mixtures.py

enum Type { FP32 = 0, BF16 = 1 };
enum Kind { CROSS_ENTROPY = 0, INTERPOLATED = 1, REVERSE = 2, TVD = 3, GJS = 4, SKEW = 5, SKEW_REVERSE = 6 };

#define SIMD _Pragma("omp simd")

inline float bits(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
inline uint32_t bits(float x) { uint32_t y; std::memcpy(&y, &x, 4); return y; }

// e^x for x <= 0; 0 below e^-87. Relative error 1e-7, however far x is from 0.
inline float exp_negative(float x) {
    float n = __builtin_rintf(x * LOG2_E);
    float f = __builtin_fmaf(n, -6.93359375e-1f, x);  // exact: n has few bits
    f = __builtin_fmaf(n, 2.12194440e-4f, f);         // in [-ln 2 / 2, ln 2 / 2]
    float y = 1.9875691500e-4f;
    y = __builtin_fmaf(y, f, 1.3981999507e-3f);
    y = __builtin_fmaf(y, f, 8.3334519073e-3f);
    y = __builtin_fmaf(y, f, 4.1665795894e-2f);
    y = __builtin_fmaf(y, f, 1.6666665459e-1f);
    y = __builtin_fmaf(y, f, 5.0000001201e-1f);
    y = __builtin_fmaf(y * f, f, f) + 1.0f;
    float clamped = n < -126.0f ? -126.0f : n;
    y *= bits(uint32_t((int32_t(clamped) + 127) << 23));
    return x < -87.0f ? 0.0f : y;
}

// e^(x - top), x <= top
inline float exp_below(float x, float top) { return exp_negative(x - top); }

// ln x for x in [TINY, 2). Absolute error 1e-7 near 1, relative elsewhere.
inline float log_positive(float x) {
    int32_t k = (int32_t(bits(x)) - 0x3f3504f3) >> 23;
    float f = bits(bits(x) - (uint32_t(k) << 23)) - 1.0f;  // in [sqrt(1/2) - 1, sqrt(2) - 1]
    float y = 7.0376836292e-2f;
    y = __builtin_fmaf(y, f, -1.1514610310e-1f);
    y = __builtin_fmaf(y, f, 1.1676998740e-1f);
    y = __builtin_fmaf(y, f, -1.2420140846e-1f);
    y = __builtin_fmaf(y, f, 1.4249322787e-1f);
    y = __builtin_fmaf(y, f, -1.6668057665e-1f);
    y = __builtin_fmaf(y, f, 2.0000714765e-1f);
    y = __builtin_fmaf(y, f, -2.4999993993e-1f);
    y = __builtin_fmaf(y, f, 3.3333331174e-1f);
    float g = f * f;
    y = y * f * g;
    float e = float(k);
    y = __builtin_fmaf(e, -2.12194440e-4f, y);
    y = __builtin_fmaf(g, -0.5f, y);
    return (f + y) + e * 0.693359375f;
}

void load(const void* source, int type, int64_t at, int n, float* out) {
    if (type == FP32) {
        const float* x = static_cast<const float*>(source) + at;
        SIMD for (int j = 0; j < n; ++j) out[j] = x[j] < FLOOR ? FLOOR : x[j];
    } else {
        const uint16_t* x = static_cast<const uint16_t*>(source) + at;
        SIMD for (int j = 0; j < n; ++j) {
            float y = bits(uint32_t(x[j]) << 16);
            out[j] = y < FLOOR ? FLOOR : y;
        }
    }
}

void store(const float* x, int n, int type, void* target, int64_t at) {
    if (type == FP32) {
        std::memcpy(static_cast<float*>(target) + at, x, n * sizeof(float));
        return;
    }
    uint16_t* y = static_cast<uint16_t*>(target) + at;
    SIMD for (int j = 0; j < n; ++j) {
        uint32_t u = bits(x[j]);
        uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
        y[j] = uint16_t(x[j] != x[j] ? 0x7fc0u : rounded);
    }
}

// As torch.lerp, so that both kernels interpolate alike.
void interpolate(const float* s, const float* z, float t, int n, float* i) {
    if (t < 0.5f) {
        SIMD for (int j = 0; j < n; ++j) i[j] = s[j] + t * (z[j] - s[j]);
    } else {
        SIMD for (int j = 0; j < n; ++j) i[j] = z[j] - (z[j] - s[j]) * (1.0f - t);
    }
}

float maximum(const float* x, int n) {
    float top = x[0];
    _Pragma("omp simd reduction(max : top)")
    for (int j = 0; j < n; ++j) top = x[j] > top ? x[j] : top;
    return top;
}

// Exponentials of one model's logits, relative to the maximum so far, and up to two weighted sums.
struct Softmax {
    float top = FLOOR;
    double sum = 0.0, first = 0.0, second = 0.0;

    // first: weighted by a, second: by b; null for none
    void add(const float* x, const float* a, const float* b, int n) {
        float block_top = maximum(x, n);
        if (block_top > top) {
            double factor = exp_below(top, block_top);
            sum *= factor, first *= factor, second *= factor;
            top = block_top;
        }
        float total = 0.0f, one = 0.0f, two = 0.0f, m = top;
        if (!a && !b) {
            _Pragma("omp simd reduction(+ : total)")
            for (int j = 0; j < n; ++j) total += exp_below(x[j], m);
        } else if (!b) {
            _Pragma("omp simd reduction(+ : total, one)")
            for (int j = 0; j < n; ++j) {
                float e = exp_below(x[j], m);
                total += e;
                one += e * a[j];
            }
        } else {
            if (!a) a = b;
            _Pragma("omp simd reduction(+ : total, one, two)")
            for (int j = 0; j < n; ++j) {
                float e = exp_below(x[j], m);
                total += e;
                one += e * a[j];
                two += e * b[j];
            }
        }
        sum += total, first += one, second += two;
    }
};

template <typename Work>
void over_tokens(int64_t tokens, int threads, Work work) {
    if (threads > tokens) threads = int(tokens);
    if (threads <= 1) return work(int64_t(0), tokens);
    std::vector<std::thread> pool;
    for (int k = 1; k < threads; ++k)
        pool.emplace_back(work, tokens * k / threads, tokens * (k + 1) / threads);
    work(int64_t(0), tokens / threads);
    for (auto& thread : pool) thread.join();
}

// A block's q and p from its logits and the normalisers (max_s, log sum_s, max_p, log sum_p), and
// their logarithms in place of the logits.
void masses(float* s, float* z, const float* row, int n, float* q, float* p) {
    SIMD for (int j = 0; j < n; ++j) {
        s[j] = (s[j] - row[0]) - row[1];
        z[j] = (z[j] - row[2]) - row[3];
        // the logarithm of a mass may exceed 0 by rounding
        q[j] = exp_negative(s[j] < 0.0f ? s[j] : 0.0f);
        p[j] = exp_negative(z[j] < 0.0f ? z[j] : 0.0f);
        q[j] = s[j] != s[j] ? s[j] : q[j];
        p[j] = z[j] != z[j] ? z[j] : p[j];
    }
}

inline float log_mixture(float share, float q, float p) {
    float r = q + share * (p - q);
    return log_positive(r < TINY ? TINY : r);
}

inline float sign(float x) { return float(x > 0.0f) - float(x < 0.0f); }

// e^x for x up to some units above 0 (a ratio of masses, bounded by 1 / share)
inline float exp_ratio(float x) {
    float y = x < -80.0f ? -80.0f : x > 80.0f ? 80.0f : x;
    float half = exp_negative(y < 0 ? y : -y);
    return x < -80.0f ? 0.0f : y < 0 ? half : 1.0f / half;
}

}  // namespace

extern "C" {

struct Logits {
    const void* data;
    int64_t stride;  // elements between tokens
    int type;
};

// Where each statistic goes, null for those not wanted; `step` elements between tokens.
struct Columns {
    float *max_s, *sum_s, *gap_s, *max_p, *sum_p, *gap_p, *student_p, *max_z, *sum_z, *gap_z, *label_s;
    int64_t step;
};

void taid_fill(Logits student, Logits teacher, int64_t tokens, int64_t width, float t,
               const int64_t* index, int64_t index_stride, Columns out, int threads) {
    bool reads_teacher = out.max_p || out.max_z || out.gap_s;
    over_tokens(tokens, threads, [=](int64_t begin, int64_t end) {
        float s[BLOCK], z[BLOCK], i[BLOCK], gap[BLOCK];
        for (int64_t token = begin; token < end; ++token) {
            Softmax of_s, of_p, of_z;
            for (int64_t column = 0; column < width; column += BLOCK) {
                int n = int(width - column < BLOCK ? width - column : BLOCK);
                load(student.data, student.type, token * student.stride + column, n, s);
                if (reads_teacher) {
                    load(teacher.data, teacher.type, token * teacher.stride + column, n, z);
                    SIMD for (int j = 0; j < n; ++j) gap[j] = z[j] - s[j];
                }
                if (out.max_p) {
                    if (t != 1.0f) interpolate(s, z, t, n, i);
                    of_p.add(t == 1.0f ? z : i, out.gap_p ? gap : nullptr, out.student_p ? s : nullptr, n);
                }
                if (out.max_z) of_z.add(z, gap, nullptr, n);
                of_s.add(s, out.gap_s ? gap : nullptr, nullptr, n);
                int64_t label = out.label_s ? index[token * index_stride] - column : -1;
                if (label >= 0 && label < n) out.label_s[token * out.step] = s[label];
            }
            auto put = [=](float* column, double value) {
                if (column) column[token * out.step] = float(value);
            };
            put(out.max_s, of_s.top), put(out.sum_s, of_s.sum), put(out.gap_s, -of_s.first);
            put(out.max_p, of_p.top), put(out.sum_p, of_p.sum), put(out.gap_p, of_p.first);
            put(out.student_p, of_p.second);
            put(out.max_z, of_z.top), put(out.sum_z, of_z.sum), put(out.gap_z, of_z.first);
        }
    });
}

// `value` and `slope` of mixtures.py; rows [tokens, row_stride]: the four normalisers.
void taid_sums(Logits student, Logits teacher, int64_t tokens, int64_t width, int kind, float share,
               const float* rows, int64_t row_stride, float* value, float* slope, int64_t step,
               int threads) {
    over_tokens(tokens, threads, [=](int64_t begin, int64_t end) {
        float s[BLOCK], z[BLOCK], q[BLOCK], p[BLOCK];
        for (int64_t token = begin; token < end; ++token) {
            const float* row = rows + token * row_stride;
            double first = 0.0, second = 0.0;
            for (int64_t column = 0; column < width; column += BLOCK) {
                int n = int(width - column < BLOCK ? width - column : BLOCK);
                load(student.data, student.type, token * student.stride + column, n, s);
                load(teacher.data, teacher.type, token * teacher.stride + column, n, z);
                masses(s, z, row, n, q, p);
                float one = 0.0f, two = 0.0f;
                if (kind == TVD) {
                    _Pragma("omp simd reduction(+ : one, two)")
                    for (int j = 0; j < n; ++j) {
                        float d = q[j] - p[j];
                        one += 0.5f * (d < 0 ? -d : d);
                        two += 0.5f * sign(d) * q[j];
                    }
                } else if (kind == GJS) {
                    _Pragma("omp simd reduction(+ : one, two)")
                    for (int j = 0; j < n; ++j) {
                        float log_r = log_mixture(share, q[j], p[j]);
                        one += (z[j] - log_r) * p[j];
                        two += (s[j] - log_r) * q[j];
                    }
                    two *= 1.0f - share;
                    one = share * one + two;
                } else if (kind == SKEW) {
                    _Pragma("omp simd reduction(+ : one, two)")
                    for (int j = 0; j < n; ++j) {
                        float ratio = z[j] - log_mixture(share, q[j], p[j]);
                        one += ratio * p[j];
                        two += exp_ratio(ratio) * q[j];
                    }
                    two *= share - 1.0f;
                } else {
                    _Pragma("omp simd reduction(+ : one, two)")
                    for (int j = 0; j < n; ++j) {
                        float ratio = s[j] - log_mixture(share, q[j], p[j]);
                        one += ratio * q[j];
                        two += exp_ratio(ratio) * q[j];
                    }
                    two = (share - 1.0f) * two + one;
                }
                first += one, second += two;
            }
            value[token * step] = float(first);
            slope[token * step] = float(second);
        }
    });
}

// Gradient in the student's logits; rows as `coefficients` of the form gives them.
void taid_gradient(Logits student, Logits teacher, int64_t tokens, int64_t width, int kind, float t,
                   const float* rows, int64_t row_stride, const int64_t* index, int64_t index_stride,
                   const float* addend, int64_t addend_stride, void* out, int64_t out_stride, int out_type, int threads) {
    over_tokens(tokens, threads, [=](int64_t begin, int64_t end) {
        float s[BLOCK], z[BLOCK], i[BLOCK], g[BLOCK];
        for (int64_t token = begin; token < end; ++token) {
            const float* row = rows + token * row_stride;
            for (int64_t column = 0; column < width; column += BLOCK) {
                int n = int(width - column < BLOCK ? width - column : BLOCK);
                load(student.data, student.type, token * student.stride + column, n, s);
                if (kind != CROSS_ENTROPY)
                    load(teacher.data, teacher.type, token * teacher.stride + column, n, z);
                if (kind == CROSS_ENTROPY) {
                    SIMD for (int j = 0; j < n; ++j) g[j] = exp_below(s[j], row[0]) * row[1];
                } else if (kind == INTERPOLATED) {
                    if (t != 1.0f) interpolate(s, z, t, n, i);
                    const float* x = t == 1.0f ? z : i;
                    SIMD for (int j = 0; j < n; ++j) {
                        float q = exp_below(s[j], row[0]) * row[1];
                        float p = exp_below(x[j], row[2]) * row[3];
                        g[j] = q - p;
                    }
                } else if (kind == REVERSE) {
                    SIMD for (int j = 0; j < n; ++j) {
                        float factor = (s[j] - z[j]) * row[1] + row[2];
                        g[j] = exp_below(s[j], row[0]) * factor;
                    }
                } else {
                    float q[BLOCK], p[BLOCK];
                    masses(s, z, row, n, q, p);
                    if (kind == TVD) {
                        SIMD for (int j = 0; j < n; ++j) g[j] = 0.5f * sign(q[j] - p[j]);
                    } else if (kind == GJS) {
                        SIMD for (int j = 0; j < n; ++j)
                            g[j] = (1.0f - t) * (s[j] - log_mixture(t, q[j], p[j]));
                    } else if (kind == SKEW) {
                        SIMD for (int j = 0; j < n; ++j)
                            g[j] = (t - 1.0f) * exp_ratio(z[j] - log_mixture(t, q[j], p[j]));
                    } else {
                        SIMD for (int j = 0; j < n; ++j) {
                            float ratio = s[j] - log_mixture(t, q[j], p[j]);
                            g[j] = ratio + (t - 1.0f) * exp_ratio(ratio);
                        }
                    }
                    SIMD for (int j = 0; j < n; ++j) g[j] = (g[j] * row[4] + row[5]) * q[j];
                }
                int64_t label = addend ? index[token * index_stride] - column : -1;
                if (label >= 0 && label < n) g[label] += addend[token * addend_stride];
                store(g, n, out_type, out, token * out_stride + column);
            }
        }
    });
}

}  // extern "C"
