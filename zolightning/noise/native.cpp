// The CPU kernels of zolightning.noise: the bits of reference.py, in one pass and without temporaries.
//
// Everything works on a *tile* of 2048 elements that stays in the first-level cache. Where z has one direction and the
// machine has AVX2 or AVX512, noise is made in registers and combined with the tensor there. Elsewhere `noise` writes the
// sum of c_k z_k into the tile, and one short loop then combines it with the tensor. Every loop is elementwise, so neither
// the tiling nor the number of threads can change a bit. Compile with -ffp-contract=off and without -ffast-math: each
// product and each sum is rounded by itself.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int WIDTH = 64;
#elif defined(__AVX2__)
#include <immintrin.h>
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pairs of words are stored as one little-endian number"
#endif

// Ahead of a loop whose passes are independent although it may work in place.
#if defined(__clang__)
#define ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#define UNROLL_ROUNDS _Pragma("clang loop unroll(full)")
#else
#define ELEMENTWISE _Pragma("GCC ivdep")
#define UNROLL_ROUNDS _Pragma("GCC unroll 10")
#endif

namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;

constexpr i64 TILE = 2048;       // elements, a multiple of what one call of `blocks` makes for any distribution
constexpr i64 GRAIN = 32 * TILE; // elements a thread takes at a time

template <class To, class From> inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// ---------------------------------------------------------------------------------------------------------- threads

// GOMP_parallel of the OpenMP runtime that torch runs on, so that no second pool of threads spins beside it.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel_region = nullptr;

// body(begin, end) over [0, total) in batches, each taken by whichever thread is free.
template <class Body> void parallel_for(i64 total, i64 batch, int threads, const Body& body) {
    if (threads < 2 || total <= batch || !parallel_region) {
        if (total > 0) body(i64(0), total);
        return;
    }
    struct Work {
        const Body& body;
        i64 total, batch;
        std::atomic<i64> next{0};
    } work{body, total, batch};
    parallel_region(
        [](void* pointer) {
            auto& w = *static_cast<Work*>(pointer);
            for (i64 at; (at = w.next.fetch_add(w.batch, std::memory_order_relaxed)) < w.total;)
                w.body(at, std::min(at + w.batch, w.total));
        },
        &work, unsigned(threads), 0u);
}

// ----------------------------------------------------------------------------------------------------------- Philox

constexpr int LANES = WIDTH / 8; // blocks computed side by side, each word in the low half of a 64-bit lane
constexpr int TOGETHER = WIDTH >= 32 ? 4 : 2; // groups of lanes: a round waits for the one before it
typedef u64 Lanes __attribute__((vector_size(WIDTH)));

inline Lanes product(Lanes word, u64 multiplier) { // of the low halves; the high halves may hold anything
#if defined(__AVX512F__)
    return (Lanes)_mm512_mul_epu32((__m512i)word, _mm512_set1_epi64(i64(multiplier)));
#elif defined(__AVX2__)
    return (Lanes)_mm256_mul_epu32((__m256i)word, _mm256_set1_epi64x(i64(multiplier)));
#elif defined(__SSE2__)
    return (Lanes)_mm_mul_epu32((__m128i)word, _mm_set1_epi64x(i64(multiplier)));
#else
    return (word & 0xFFFFFFFFu) * multiplier;
#endif
}

// The high half of each lane moved to its low half; what is left in the high half does not matter. A shuffle, where
// there is one, leaves the vector port that the products need alone.
inline Lanes high(Lanes x) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_DDBB);
#else
    return x >> 32;
#endif
}

struct Stream {
    u32 k0, k1, leaf, query;
};

// The low half of each lane of both, as one number.
inline Lanes halves(Lanes low, Lanes high) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Lanes)_mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0xAA);
#else
    return (low & 0xFFFFFFFFu) | (high << 32);
#endif
}

// Words 0, 1 and words 2, 3 of each block, put together in the blocks' order.
inline void store_blocks(Lanes first, Lanes last, u32* words) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(words, _mm512_permutex2var_epi64((__m512i)first, low, (__m512i)last));
    _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64((__m512i)first, high, (__m512i)last));
#elif defined(__AVX2__)
    const __m256i even = _mm256_unpacklo_epi64((__m256i)first, (__m256i)last);
    const __m256i odd = _mm256_unpackhi_epi64((__m256i)first, (__m256i)last);
    _mm256_storeu_si256((__m256i*)words, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i*)(words + 8), _mm256_permute2x128_si256(even, odd, 0x31));
#else
    for (int i = 0; i < LANES; ++i) {
        const u64 block[2] = {first[i], last[i]};
        std::memcpy(words + 4 * i, block, sizeof block);
    }
#endif
}

// GROUPS * LANES blocks, those of the numbers from `low` on whose high half is `top`. The round constants are added first,
// aside from the way that the next round waits for; what all blocks of a tile have in common, the compiler takes out.
template <int GROUPS>
inline void group(const Stream& s, Lanes low, Lanes top, const Lanes* k0, const Lanes* k1, u32* words) {
    Lanes c0[GROUPS], c1[GROUPS], c2[GROUPS], c3[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
        c0[g] = low + u64(g * LANES), c1[g] = top;
        c2[g] = (low & 0) + s.leaf, c3[g] = (low & 0) + s.query;
    }
    UNROLL_ROUNDS
    for (int round = 0; round < 10; ++round)
        for (int g = 0; g < GROUPS; ++g) {
            const Lanes p0 = product(c0[g], 0xD2511F53u), p1 = product(c2[g], 0xCD9E8D57u);
            c0[g] = high(p1) ^ (c1[g] ^ k0[round]), c1[g] = p1;
            c2[g] = high(p0) ^ (c3[g] ^ k1[round]), c3[g] = p0;
        }
    for (int g = 0; g < GROUPS; ++g)
        store_blocks(halves(c0[g], c1[g]), halves(c2[g], c3[g]), words + 4 * LANES * g);
}

// Blocks first ... first + count of a stream, which lie in one tile, count a multiple of LANES: four words each, in order.
void blocks(const Stream& s, u64 first, i64 count, u32* words) {
    Lanes lane, k0[10], k1[10];
    for (int i = 0; i < LANES; ++i) lane[i] = u64(i);
    for (u32 round = 0; round < 10; ++round) {
        k0[round] = (lane & 0) + u64(s.k0 + round * 0x9E3779B9u);
        k1[round] = (lane & 0) + u64(s.k1 + round * 0xBB67AE85u);
    }
    const Lanes top = (lane & 0) + (first >> 32);
    i64 b = 0;
    for (; b + TOGETHER * LANES <= count; b += TOGETHER * LANES)
        group<TOGETHER>(s, lane + (first + u64(b)), top, k0, k1, words + 4 * b);
    for (; b < count; b += LANES) group<1>(s, lane + (first + u64(b)), top, k0, k1, words + 4 * b);
}

// ---------------------------------------------------------------------------------------------------- distributions

enum Kind : int { RADEMACHER = 0, GAUSSIAN = 1 };

struct Term {
    u32 k0, k1, query;
    float coefficient;
};

template <bool ADD> void put_rademacher(const u32* words, i64 count, float c, float* tile) {
#if defined(__AVX512F__)
    const __m512 plus = _mm512_set1_ps(c), minus = _mm512_set1_ps(-c);
    for (i64 half = 0; half < 2 * count; ++half, tile += 16) {
        const __m512 value = _mm512_mask_blend_ps(__mmask16(words[half / 2] >> half % 2 * 16), plus, minus);
        _mm512_storeu_ps(tile, ADD ? _mm512_add_ps(_mm512_loadu_ps(tile), value) : value);
    }
#else
    for (i64 w = 0; w < count; ++w)
        for (int i = 0; i < 32; ++i) {
            const float value = bits<float>(bits<u32>(c) ^ ((words[w] << (31 - i)) & 0x80000000u));
            float& place = tile[32 * w + i];
            place = ADD ? place + value : value;
        }
#endif
}

// One number or a register of them: the formulas below are written once, for either.
typedef float Floats __attribute__((vector_size(WIDTH)));
typedef u32 Words __attribute__((vector_size(WIDTH)));
typedef int Ints __attribute__((vector_size(WIDTH)));
typedef float Unaligned __attribute__((vector_size(WIDTH), aligned(4), may_alias)); // in memory: compilers copy by halves
constexpr int LANE = WIDTH / 4; // numbers of a register

inline float number(u32 integer) { return float(int(integer)); }
inline Floats number(Words integers) { return __builtin_convertvector((Ints)integers, Floats); }
inline float root(float x) { return std::sqrt(x); }
inline Floats root(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < LANE; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}
inline float choose(u32 highest_bit, float set, float clear) { return int(highest_bit) < 0 ? set : clear; }
inline Floats choose(Words highest_bit, Floats set, Floats clear) { return (Ints)highest_bit < 0 ? set : clear; }

// distributions._radius: sqrt(-2 ln u) for u = (2 low half + 1) / 2**17
template <class F, class W> inline F radius(W word) {
    const W u = bits<W>(number((word & 0xFFFFu) * 2u + 1u) * 0x1p-17f);
    const W power = (u - 0x3F3504F3u) & 0xFF800000u; // exponent * 2**23, u = mantissa * 2**exponent, mantissa in [sqrt(1/2), sqrt(2))
    const F x = bits<F>(u - power) - 1.0f;
    const F square = x * x; // -2 ln(1 + x) / x by three lines at once, which is faster than one after another
    const F y = ((0.28674802f * x + -0.44629266f) * square + (0.50928687f * x + -0.66456061f)) * square +
                (0.99971165f * x + -2.000024f);
    return root(number(power) * (-1.3862944f * 0x1p-23f) + y * x);
}

// distributions._cos_sin: 13 bits are the angle in (0, pi/4), the three highest choose among its eight images
template <class F, class W> inline void cos_sin(W word, F& cos, F& sin) {
    const F angle = number((word >> 15 & 0x3FFEu) | 1u) * float(0.7853981633974483 / 16384.0);
    const F square = angle * angle;
    const F sine = (0.00815299f * square + -0.16662834f) * square * angle + angle;
    const F cosine = ((-0.00135978f * square + 0.04165629f) * square + -0.49999895f) * square + 1.0f;
    cos = bits<F>(bits<W>(choose(word << 2, sine, cosine)) | (word & 0x80000000u));
    sin = bits<F>(bits<W>(choose(word << 2, cosine, sine)) | (word << 1 & 0x80000000u));
}

template <class F, class W> inline void normal_pair(W word, float c, F& first, F& second) {
    F cos, sin;
    const F r = radius<F>(word);
    cos_sin(word, cos, sin);
    first = r * cos * c, second = r * sin * c;
}

template <bool ADD> void put_gaussian(const u32* words, i64 count, float c, float* tile) {
    for (i64 i = 0; i < count; ++i) {
        float first, second;
        normal_pair(words[i], c, first, second);
        tile[2 * i] = ADD ? tile[2 * i] + first : first;
        tile[2 * i + 1] = ADD ? tile[2 * i + 1] + second : second;
    }
}

struct Noise {
    int kind;
    const Term* terms;
    i64 count;
    u32 leaf;

    i64 per_word() const { return kind == RADEMACHER ? 32 : 2; }

    // The words of a term for [begin, end), which lie in one tile: that of e at e % TILE / per_word, and those that one
    // call of `blocks` makes with them. A query given replaces the term's. Returns the first element.
    i64 draw(const Term& t, i64 begin, i64 end, u32* words, const i64* query = nullptr) const {
        const i64 per_block = 4 * per_word(), span = LANES * per_block;
        const i64 from = begin / span * span, to = (end + span - 1) / span * span;
        const Stream stream{t.k0, t.k1, leaf, query ? u32(*query) : t.query};
        blocks(stream, u64(from / per_block), (to - from) / per_block, words + from % TILE / per_word());
        return from;
    }

    // tile[e % TILE] = sum of c z(e) for e in [begin, end), which lie in one tile; a query given replaces the terms'.
    void operator()(i64 begin, i64 end, float* tile, const i64* query = nullptr) const {
        if (!count) std::fill(tile + begin % TILE, tile + begin % TILE + (end - begin), 0.0f);
        u32 words[TILE / 2];
        for (i64 k = 0; k < count; ++k) {
            const i64 from = draw(terms[k], begin, end, words, query), n = (end - from + per_word() - 1) / per_word();
            float* place = tile + from % TILE;
            const u32* own = words + from % TILE / per_word();
            const float c = terms[k].coefficient;
            if (kind == RADEMACHER) (k ? put_rademacher<true> : put_rademacher<false>)(own, n, c, place);
            else (k ? put_gaussian<true> : put_gaussian<false>)(own, n, c, place);
        }
    }
};

// sum over k, in order, of a[k, row] * b[k, column + j]: a library's product would sum in an order of its own
struct Outer {
    static constexpr i64 SPAN = 256; // columns at a time, so that those of b stay in the first-level cache
    const float *a, *b;
    i64 count, rows, columns;
    u32 leaf = 0;

    void span(i64 row, i64 column, i64 width, float* out) const { // width <= SPAN
        float sum[SPAN] = {};
        for (i64 k = 0; k < count; ++k) {
            const float factor = a[k * rows + row];
            const float* right = b + (k * columns + column);
            ELEMENTWISE
            for (i64 j = 0; j < width; ++j) sum[j] += factor * right[j];
        }
        std::memcpy(out, sum, size_t(width) * sizeof(float));
    }

    // tile[e % TILE] = that of element e for e in [begin, end), which lie in one tile
    void operator()(i64 begin, i64 end, float* tile) const {
        for (i64 at = begin, width; at < end; at += width) {
            const i64 column = at % columns;
            width = std::min({SPAN, end - at, columns - column});
            span(at / columns, column, width, tile + at % TILE);
        }
    }
};

// body(begin, end) for every part of [begin, end) that lies in one tile
template <class Body> inline void tiles(i64 begin, i64 end, const Body& body) {
    for (i64 at = begin, next; at < end; at = next) {
        next = std::min(end, at / TILE * TILE + TILE);
        body(at, next);
    }
}

// body(row, column, begin, end) for every part of every row that lies in one tile: the row's elements from `column` on,
// which are begin ... end of the leaf, the row itself starting at origin(row).
template <class Origin, class Body>
void sweep(i64 rows, i64 width, int threads, const Origin& origin, const Body& body) {
    const i64 pieces = (width + GRAIN - 1) / GRAIN, batch = std::max<i64>(1, GRAIN / std::max<i64>(1, width));
    parallel_for(rows * pieces, batch, threads, [&](i64 first, i64 last) {
        for (i64 item = first; item < last; ++item) {
            const i64 row = item / pieces, column = item % pieces * GRAIN, start = origin(row);
            const i64 stop = start + std::min(width, column + GRAIN);
            tiles(start + column, stop, [&](i64 begin, i64 end) { body(row, begin - start, begin, end); });
        }
    });
}

struct Run { // elements start ... start + length of a leaf
    i64 leaf, start, length;
    void* data;
};

// body(run, begin, end) for every part of every run that lies in one tile
template <class Body> void sweep_runs(const Run* runs, i64 n, int threads, const Body& body) {
    std::vector<i64> pieces(size_t(n) + 1, 0); // those before each run
    for (i64 r = 0; r < n; ++r) pieces[r + 1] = pieces[r] + (runs[r].length + GRAIN - 1) / GRAIN;
    parallel_for(pieces[n], 1, threads, [&](i64 first, i64 last) {
        i64 r = std::upper_bound(pieces.begin(), pieces.end(), first) - pieces.begin() - 1;
        for (i64 item = first; item < last; ++item) {
            while (item >= pieces[r + 1]) ++r;
            const Run& run = runs[r];
            const i64 column = (item - pieces[r]) * GRAIN, stop = run.start + std::min(run.length, column + GRAIN);
            tiles(run.start + column, stop, [&](i64 begin, i64 end) { body(run, begin, end); });
        }
    });
}

// ------------------------------------------------------------------------------------------------------------ dtypes

struct BFloat16 {
    u16 raw;
    static constexpr u32 LARGEST = 0x7F7F0000u; // as bits of a float
    explicit operator float() const { return bits<float>(u32(raw) << 16); }
    BFloat16() = default;
    explicit BFloat16(float value) { // to nearest, ties to even
        const u32 b = bits<u32>(value);
        const u32 nan = (b >> 16) | 0x40u, nearest = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
        raw = u16((b & 0x7FFFFFFFu) > 0x7F800000u ? nan : nearest);
    }
    static float round(float value, u32 random) { return bits<float>((bits<u32>(value) + random) & ~0xFFFFu); }
};

struct Float16 {
    u16 raw;
    static constexpr u32 LARGEST = 0x477FE000u; // 65504
    explicit operator float() const {
        const u32 magnitude = u32(raw & 0x7FFFu) << 13, sign = u32(raw & 0x8000u) << 16;
        const u32 normal = magnitude + (112u << 23), tiny = bits<u32>(float(raw & 0x3FF) * 0x1p-24f);
        u32 result = magnitude < (1u << 23) ? tiny : normal;
        result = magnitude < (31u << 23) ? result : magnitude + (224u << 23); // infinity, not a number
        return bits<float>(result | sign);
    }
    Float16() = default;
    explicit Float16(float value) { // to nearest, ties to even
        const u32 b = bits<u32>(value), magnitude = b & 0x7FFFFFFFu;
        const u32 normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
        const u32 tiny = bits<u32>(bits<float>(magnitude) + 0.5f) - bits<u32>(0.5f); // the sum rounds at 2**-24
        u32 result = magnitude < 0x38800000u ? tiny : normal;
        result = magnitude < 0x477FF000u ? result : 0x7C00u;
        result = magnitude <= 0x7F800000u ? result : 0x7E00u;
        raw = u16(result | ((b >> 16) & 0x8000u));
    }
    static float round(float value, u32 random) {
        const u32 b = bits<u32>(value), magnitude = b & 0x7FFFFFFFu;
        const u32 normal = (b + (random & 0x1FFFu)) & ~0x1FFFu;
        const float scaled = bits<float>(std::min(magnitude, 0x38800000u)) * 0x1p24f; // below 2**-14: a grid of 2**-24
        const float whole = float(int(scaled));
        const float up = float(int(random)) + 0.5f < (scaled - whole) * 65536.0f ? 1.0f : 0.0f;
        const u32 tiny = bits<u32>((whole + up) * 0x1p-24f) | (b & 0x80000000u);
        return bits<float>(magnitude < 0x38800000u ? tiny : normal);
    }
};

template <class T> struct Working { using type = float; };
template <> struct Working<double> { using type = double; };

template <class To, class From> inline To convert(From value) {
    if constexpr (sizeof(To) == 2 && sizeof(From) == 8) return To(float(value)); // torch rounds twice here as well
    else return To(value);
}

// value rounded up or down with odds given by the distance to each; beyond the largest finite number, to nearest
template <class T> inline T stochastic(float value, u32 random) {
    const bool ordinary = (bits<u32>(value) & 0x7FFFFFFFu) <= T::LARGEST;
    const u32 rounded = bits<u32>(T::round(value, random));
    return T(bits<float>(ordinary ? rounded : bits<u32>(value)));
}

typedef u16 __attribute__((may_alias)) Bits16;

// 16 bits for each e in [begin, end), which lie in one tile, eight a block, made in `words`: those of `begin` and on
const Bits16* rounding_bits(const Stream& stream, i64 begin, i64 end, u32 (&words)[TILE / 2]) {
    const i64 span = LANES * 8, from = begin / span * span, to = (end + span - 1) / span * span;
    blocks(stream, u64(from / 8), (to - from) / 8, words + from % TILE / 2);
    return reinterpret_cast<const Bits16*>(words) + begin % TILE;
}

// ------------------------------------------------------------------------------------------------------------ sweeps

template <class W> inline W multiply_add(W x, W y, W z) { // rounded once
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<W, Floats>) return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
    else
#elif defined(__AVX2__) && defined(__FMA__)
    if constexpr (std::is_same_v<W, Floats>) return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
    else
#endif
        return std::fma(x, y, z);
}

// a + x * alpha as torch.add rounds it: once where its kernels use fused multiply-add, else twice
template <bool FUSED, class W> inline W add(W a, W x, W alpha) {
    if constexpr (FUSED) return multiply_add(x, alpha, a);
    else return a + x * alpha;
}

// Thirty-two elements at a time, in registers, for as long as they can: each of these gives the bits of the plain loop
// behind it, and returns how many elements it did.
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
constexpr int PARTS = 32 / LANE;

struct Wide {
    Floats part[PARTS];
};

template <class F, class... W> inline Wide each(const F& f, const W&... values) {
    Wide result;
    for (int p = 0; p < PARTS; ++p) result.part[p] = f(values.part[p]...);
    return result;
}

inline Floats all(float value) { return value - Floats{}; } // keeps the sign of a zero
inline Floats sum(Floats a, Floats b) { return a + b; }
inline Floats difference(Floats a, Floats b) { return a - b; }

// Ask for what will be read soon, as processors look no further than the page of memory that they read in.
template <class T> inline void prefetch(const T* at) {
    const char* soon = (const char*)at + 2048;
    for (size_t line = 0; line < 32 * sizeof(T); line += 64) __builtin_prefetch(soon + line);
}
inline Wide load(const float* from) {
    Wide value;
    for (int p = 0; p < PARTS; ++p) value.part[p] = *(const Unaligned*)(from + p * LANE);
    return value;
}
inline void store(const Wide& value, float* to) {
    for (int p = 0; p < PARTS; ++p) *(Unaligned*)(to + p * LANE) = value.part[p];
}
inline bool store_rounded(const Wide& value, const Bits16*, i64 i, float* to) {
    store(value, to + i);
    return true;
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <class T> constexpr bool wide = std::is_same_v<T, float> || std::is_same_v<T, BFloat16>;

inline __m512i load16(const void* from) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)); }
inline Wide load(const BFloat16* from) {
    const auto whole = [](__m512i raw) { return (Floats)_mm512_slli_epi32(raw, 16); };
    return {{whole(load16(from)), whole(load16(from + 16))}};
}
inline void store(const Wide& value, BFloat16* to) {
    const __m512i nearest = (__m512i)_mm512_cvtne2ps_pbh((__m512)value.part[1], (__m512)value.part[0]);
    _mm512_storeu_si512(to, nearest);
    if (_mm512_testn_epi16_mask(nearest, _mm512_set1_epi16(0x7FFF))) // subnormal numbers, too, are zeros to the instruction
        for (int i = 0; i < 32; ++i) to[i] = BFloat16(value.part[i / 16][i % 16]);
}
// Stochastically; false, and nothing is stored, where a number is beyond the largest finite one.
inline bool store_rounded(const Wide& value, const Bits16* random, i64 i, BFloat16* to) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF), largest = _mm512_set1_epi32(0x7F7F0000);
    u16 places[32]; // of the high halves of thirty-two numbers of 32 bits
    for (int l = 0; l < 32; ++l) places[l] = u16(2 * l + 1);
    const __m512i low = (__m512i)value.part[0], high = (__m512i)value.part[1];
    const __m512i most = _mm512_max_epu32(_mm512_and_si512(low, magnitude), _mm512_and_si512(high, magnitude));
    if (_mm512_cmpgt_epu32_mask(most, largest)) return false;
    const __m512i a = _mm512_add_epi32(low, load16(random + i)), b = _mm512_add_epi32(high, load16(random + i + 16));
    _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(a, _mm512_loadu_si512(places), b));
    return true;
}
#else
template <class T> constexpr bool wide = std::is_same_v<T, float>;
#endif

struct Sums { // z that lies in a tile
    const float* z;
    Wide operator()(i64 i) const { return load(z + i); }
};

struct Signs { // z of Rademacher noise, from its bits
    const u32* words;
    float c;
    Wide operator()(i64 i) const {
        const u32 word = words[i / 32];
        Wide z;
#if defined(__AVX512F__)
        const __m512 plus = _mm512_set1_ps(c), minus = _mm512_set1_ps(-c);
        for (int p = 0; p < PARTS; ++p) z.part[p] = (Floats)_mm512_mask_blend_ps(__mmask16(word >> 16 * p), plus, minus);
#else
        for (int p = 0; p < PARTS; ++p) {
            Words left; // from each lane's bit to the highest
            for (int l = 0; l < LANE; ++l) left[l] = u32(31 - LANE * p - l);
            z.part[p] = (Floats)(((word - Words{}) << left & 0x80000000u) ^ bits<u32>(c));
        }
#endif
        return z;
    }
};

struct Normals { // z of Gaussian noise, from its words
    const u32* words;
    float c;
    Wide operator()(i64 i) const {
        Wide z;
        for (int p = 0; p < PARTS; p += 2) {
            Floats first, second;
            normal_pair((Words)*(const Unaligned*)(words + i / 2 + p / 2 * LANE), c, first, second);
            interleave(first, second, z.part + p);
        }
        return z;
    }

  private:
    static void interleave(Floats first, Floats second, Floats* to) {
#if defined(__AVX512F__)
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        to[0] = (Floats)_mm512_permutex2var_ps((__m512)first, low, (__m512)second);
        to[1] = (Floats)_mm512_permutex2var_ps((__m512)first, high, (__m512)second);
#else
        const __m256 even = _mm256_unpacklo_ps((__m256)first, (__m256)second);
        const __m256 odd = _mm256_unpackhi_ps((__m256)first, (__m256)second);
        to[0] = (Floats)_mm256_permute2f128_ps(even, odd, 0x20);
        to[1] = (Floats)_mm256_permute2f128_ps(even, odd, 0x31);
#endif
    }
};

template <class Z, class In, class Out> i64 perturb_wide(const In* in, const Z& z, i64 count, Out* to) {
    if constexpr (!wide<In> || !wide<Out>) return 0;
    else {
        i64 i = 0;
        for (; i + 32 <= count; i += 32) {
            prefetch(in + i);
            store(each(sum, load(in + i), z(i)), to + i);
        }
        return i;
    }
}

template <class Z, class In, class Out> i64 perturb_both_wide(const In* in, const Z& z, i64 count, Out* plus, Out* minus) {
    if constexpr (!wide<In> || !wide<Out>) return 0;
    else {
        i64 i = 0;
        for (; i + 32 <= count; i += 32) {
            prefetch(in + i);
            const Wide stored = load(in + i), noise = z(i);
            store(each(sum, stored, noise), plus + i);
            store(each(difference, stored, noise), minus + i);
        }
        return i;
    }
}

template <bool FUSED, class Z, class T>
i64 sgd_wide(const Z& z, const Bits16* random, float step, float decay, i64 count, T* target) {
    if constexpr (!wide<T>) return 0;
    else {
        const Floats by = all(step), weight_decay = all(decay);
        const auto updated = [&](Floats old, Floats plain) {
            return add<FUSED>(old, decay != 0.0f ? add<FUSED>(plain, old, weight_decay) : plain, by);
        };
        i64 i = 0;
        for (; i + 32 <= count; i += 32) {
            prefetch(target + i);
            if (!store_rounded(each(updated, load(target + i), z(i)), random, i, target)) break;
        }
        return i;
    }
}

// f(z) for the elements begin ... end, which lie in one tile, if z has one direction
template <class F> i64 in_registers(const Noise& noise, i64 begin, i64 end, const F& f) {
    if (noise.count != 1 || begin % 32) return 0;
    const Term& t = noise.terms[0];
    u32 words[TILE / 2];
    noise.draw(t, begin, end, words);
    const u32* own = words + begin % TILE / noise.per_word();
    return noise.kind == RADEMACHER ? f(Signs{own, t.coefficient}) : f(Normals{own, t.coefficient});
}
template <class F> i64 in_registers(const Outer&, i64, i64, const F&) { return 0; }
#else
struct Sums {
    const float* z;
};
template <class... A> i64 perturb_wide(const A&...) { return 0; }
template <class... A> i64 perturb_both_wide(const A&...) { return 0; }
template <bool FUSED, class... A> i64 sgd_wide(const A&...) { return 0; }
template <class Source, class F> i64 in_registers(const Source&, i64, i64, const F&) { return 0; }
#endif

template <class In, class Out>
void perturb(const Noise& noise, i64 start, const i64* rows, i64 n, i64 width, const In* source, Out* out,
             int threads) {
    using Work = typename Working<In>::type;
    const auto origin = [&](i64 row) { return start + (rows ? rows[row] * width : 0); };
    sweep(n, width, threads, origin, [&](i64 row, i64 column, i64 begin, i64 end) {
        const In* in = source + (row * width + column);
        Out* to = out + (row * width + column);
        const i64 count = end - begin;
        i64 i = in_registers(noise, begin, end, [&](const auto& z) { return perturb_wide(in, z, count, to); });
        if (i == count) return;
        alignas(64) float tile[TILE];
        noise(begin + i, end, tile);
        const float* z = tile + begin % TILE;
        if (!i) i = perturb_wide(in, Sums{z}, count, to);
        ELEMENTWISE
        for (i64 j = i; j < count; ++j) to[j] = convert<Out>(Work(in[j]) + Work(z[j]));
    });
}

// plus = source + c z, minus = source - c z
template <class In, class Out>
void perturb_both(const Noise& noise, i64 start, i64 length, const In* source, Out* plus, Out* minus, int threads) {
    using Work = typename Working<In>::type;
    sweep(1, length, threads, [&](i64) { return start; }, [&](i64, i64 column, i64 begin, i64 end) {
        const In* in = source + column;
        Out *up = plus + column, *down = minus + column;
        const i64 count = end - begin;
        i64 i = in_registers(noise, begin, end, [&](const auto& z) { return perturb_both_wide(in, z, count, up, down); });
        if (i == count) return;
        alignas(64) float tile[TILE];
        noise(begin + i, end, tile);
        const float* z = tile + begin % TILE;
        if (!i) i = perturb_both_wide(in, Sums{z}, count, up, down);
        ELEMENTWISE
        for (i64 j = i; j < count; ++j) {
            const Work stored = Work(in[j]), by = Work(z[j]);
            up[j] = convert<Out>(stored + by);
            down[j] = convert<Out>(stored - by);
        }
    });
}

template <class T> void round_tile(const Bits16* random, const float* value, i64 count, T* target) {
    ELEMENTWISE
    for (i64 i = 0; i < count; ++i) target[i] = stochastic<T>(value[i], random[i]);
}

// w -= lr * (z + decay * w), z being a Noise or an Outer of each run's leaf
template <class T, bool FUSED, class Source>
void sgd(const Source& like, const Stream& rounding_like, const Run* runs, i64 n, double lr, double decay, int threads) {
    using Work = typename Working<T>::type;
    const Work step = Work(-lr), weight_decay = Work(decay);
    const bool decays = decay != 0.0;
    sweep_runs(runs, n, threads, [&](const Run& run, i64 begin, i64 end) {
        Source noise = like;
        Stream rounding = rounding_like;
        noise.leaf = rounding.leaf = u32(run.leaf);
        T* w = static_cast<T*>(run.data) + (begin - run.start);
        const i64 count = end - begin;
        alignas(64) u32 words[TILE / 2];
        const Bits16* random = nullptr;
        if constexpr (sizeof(T) == 2) random = rounding_bits(rounding, begin, end, words);
        const auto fast = [&](const auto& z) { return sgd_wide<FUSED>(z, random, float(step), float(weight_decay), count, w); };
        i64 i = in_registers(noise, begin, end, fast);
        if (i == count) return;
        alignas(64) float tile[TILE];
        noise(begin + i, end, tile);
        float* z = tile + begin % TILE;
        if (!i) i = fast(Sums{z});
        Work* updated;
        if constexpr (sizeof(T) == 2) updated = z;
        else updated = w;
        ELEMENTWISE
        for (i64 j = i; j < count; ++j) {
            const Work old = Work(w[j]), plain = Work(z[j]), decayed = add<FUSED>(plain, old, weight_decay);
            updated[j] = add<FUSED>(old, decays ? decayed : plain, step);
        }
        if constexpr (sizeof(T) == 2) round_tile(random + i, z + i, count - i, w + i);
    });
}

void outer_sum(const Outer& outer, float* out, int threads) {
    const i64 columns = outer.columns;
    parallel_for(outer.rows, std::max(i64(1), GRAIN / columns), threads, [&](i64 first, i64 last) {
        for (i64 left = 0; left < columns; left += Outer::SPAN)
            for (i64 i = first; i < last; ++i)
                outer.span(i, left, std::min(Outer::SPAN, columns - left), out + (i * columns + left));
    });
}

// out[i] = stored[i] where |stored[i]| > limit. Magnitudes sort as their bits do; beyond infinity's they are no numbers.
template <class In, class Out> void keep_large(const In* stored, i64 count, double limit, Out* out, int threads) {
    using Raw = std::conditional_t<sizeof(In) == 2, u16, std::conditional_t<sizeof(In) == 4, u32, u64>>;
    using RawOut = std::conditional_t<sizeof(Out) == 2, u16, std::conditional_t<sizeof(Out) == 4, u32, u64>>;
    constexpr Raw SIGNLESS = Raw(~Raw(0)) >> 1;
    const Raw most = bits<Raw>(convert<In>(limit)), infinity = bits<Raw>(convert<In>(HUGE_VAL));
    parallel_for(count, GRAIN, threads, [&](i64 begin, i64 end) {
        ELEMENTWISE
        for (i64 i = begin; i < end; ++i) {
            const Raw magnitude = bits<Raw>(stored[i]) & SIGNLESS;
            RawOut kept;
            if constexpr (std::is_same_v<In, Out>) kept = bits<RawOut>(stored[i]);
            else kept = bits<RawOut>(convert<Out>(typename Working<In>::type(stored[i])));
            const RawOut now = bits<RawOut>(out[i]);
            out[i] = bits<Out>(magnitude > most && magnitude <= infinity ? kept : now);
        }
    });
}

// sum over i of mix(word i ^ (first + i) * STEP), modulo 2^64: in any order
u64 mixed_sum(const char* data, i64 words, i64 first, int threads) {
    std::atomic<u64> total{0};
    parallel_for(words, GRAIN, threads, [&](i64 begin, i64 end) {
        u64 sum = 0;
        for (i64 i = begin; i < end; ++i) {
            u64 word;
            std::memcpy(&word, data + 8 * i, 8);
            word = (word ^ u64(first + i) * 0x9E3779B97F4A7C15u) * 0xBF58476D1CE4E5B9u;
            word = (word ^ word >> 29) * 0x94D049BB133111EBu;
            sum += word ^ word >> 32;
        }
        total.fetch_add(sum, std::memory_order_relaxed);
    });
    return total;
}

// Call f with a null pointer of the type that a dtype's code names.
template <class F> void dispatch(int dtype, const F& f) {
    switch (dtype) {
    case 0: return f((float*)nullptr);
    case 1: return f((double*)nullptr);
    case 2: return f((BFloat16*)nullptr);
    case 3: return f((Float16*)nullptr);
    }
}

} // namespace

// -------------------------------------------------------------------------------------------------------- interface

extern "C" {

void zol_set_parallel(void* region) { parallel_region = bits<Parallel>(region); }

// out[row, i] = sum of c z(starts[row] + i); queries, if given, replace the terms' own
void zol_noise(int kind, const Term* terms, i64 count, u32 leaf, const i64* starts, const i64* queries, i64 rows,
               i64 width, float* out, int threads) {
    const Noise noise{kind, terms, count, leaf};
    sweep(rows, width, threads, [&](i64 row) { return starts[row]; }, [&](i64 row, i64 column, i64 begin, i64 end) {
        alignas(64) float tile[TILE];
        noise(begin, end, tile, queries ? queries + row : nullptr);
        std::memcpy(out + (row * width + column), tile + begin % TILE, size_t(end - begin) * sizeof(float));
    });
}

// out[row, i] = source[row, i] + sum of c z(start + rows[row] * width + i); one row 0 where rows is null
void zol_perturb(int kind, const Term* terms, i64 count, u32 leaf, i64 start, const i64* rows, i64 n_rows, i64 width,
                 int source_type, const void* source, int out_type, void* out, int threads) {
    const Noise noise{kind, terms, count, leaf};
    dispatch(source_type, [&](auto* in) {
        dispatch(out_type, [&](auto* to) {
            perturb(noise, start, rows, n_rows, width, static_cast<decltype(in)>(const_cast<void*>(source)),
                    static_cast<decltype(to)>(out), threads);
        });
    });
}

// plus, minus = source +- c z, over one run
void zol_perturb_both(int kind, const Term* terms, i64 count, u32 leaf, i64 start, i64 length, int source_type,
                      const void* source, int out_type, void* plus, void* minus, int threads) {
    const Noise noise{kind, terms, count, leaf};
    dispatch(source_type, [&](auto* in) {
        dispatch(out_type, [&](auto* to) {
            using Out = decltype(to);
            perturb_both(noise, start, length, static_cast<decltype(in)>(const_cast<void*>(source)),
                         static_cast<Out>(plus), static_cast<Out>(minus), threads);
        });
    });
}

void zol_round(u32 k0, u32 k1, u32 leaf, u32 query, i64 start, i64 length, const float* value, int type, void* target,
               int threads) {
    const Stream stream{k0, k1, leaf, query};
    dispatch(type, [&](auto* to) {
        using T = std::remove_pointer_t<decltype(to)>;
        if constexpr (sizeof(T) == 2) {
            T* out = static_cast<T*>(target);
            sweep(1, length, threads, [&](i64) { return start; }, [&](i64, i64 column, i64 begin, i64 end) {
                alignas(64) u32 words[TILE / 2];
                round_tile(rounding_bits(stream, begin, end, words), value + column, end - begin, out + column);
            });
        }
    });
}

// each run's own leaf in the noise and in the rounding stream
void zol_sgd(int kind, const Term* terms, i64 count, const Run* runs, i64 n, u32 k0, u32 k1, u32 query, double lr,
             double decay, int fused, int type, int threads) {
    const Noise noise{kind, terms, count, 0};
    const Stream rounding{k0, k1, 0, query};
    dispatch(type, [&](auto* to) {
        using T = std::remove_pointer_t<decltype(to)>;
        const auto update = fused ? sgd<T, (sizeof(T) > 2), Noise> : sgd<T, false, Noise>;
        update(noise, rounding, runs, n, lr, decay, threads);
    });
}

// the same of one run that is a whole leaf, by a sum of outer products
void zol_outer_sgd(const float* a, const float* b, i64 count, i64 rows, i64 columns, const Run* run, u32 k0, u32 k1,
                   u32 query, double lr, double decay, int fused, int type, int threads) {
    const Outer outer{a, b, count, rows, columns};
    const Stream rounding{k0, k1, 0, query};
    dispatch(type, [&](auto* to) {
        using T = std::remove_pointer_t<decltype(to)>;
        const auto update = fused ? sgd<T, (sizeof(T) > 2), Outer> : sgd<T, false, Outer>;
        update(outer, rounding, run, 1, lr, decay, threads);
    });
}

void zol_outer_sum(const float* a, const float* b, i64 count, i64 rows, i64 columns, float* out, int threads) {
    outer_sum(Outer{a, b, count, rows, columns}, out, threads);
}

void zol_keep_large(i64 count, double limit, int stored_type, const void* stored, int out_type, void* out,
                    int threads) {
    dispatch(stored_type, [&](auto* in) {
        dispatch(out_type, [&](auto* to) {
            keep_large(static_cast<decltype(in)>(const_cast<void*>(stored)), count, limit,
                       static_cast<decltype(to)>(out), threads);
        });
    });
}

void zol_mixed_sum(const void* words, i64 count, i64 first, u64* total, int threads) {
    *total = mixed_sum(static_cast<const char*>(words), count, first, threads);
}

} // extern "C"
