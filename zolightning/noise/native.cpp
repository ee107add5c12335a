// The CPU kernels of zolightning.noise: the bits of reference.py, in one pass and without temporaries.
//
// Everything works on a *tile* of 1024 elements that stays in the first-level cache: `noise` writes the sum of c_k z_k
// into it, and one short loop then combines it with the tensor. Every loop is elementwise, so neither the tiling nor
// the number of threads can change a bit. Compile with -ffp-contract=off and without -ffast-math: each product and each
// sum is rounded by itself. Loops are plain C++ for the compiler to vectorise; only Philox names vectors, because
// compilers do not find the 32x32 -> 64 bit product by themselves.

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
#else
#define ELEMENTWISE _Pragma("GCC ivdep")
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
constexpr int TOGETHER = WIDTH == 64 ? 4 : 2; // groups of lanes, as many as the registers hold
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

// Words 0, 1 and words 2, 3 of each block, put together in the blocks' order.
inline void store_blocks(Lanes first, Lanes last, u32* words) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(words, _mm512_permutex2var_epi64((__m512i)first, low, (__m512i)last));
    _mm512_storeu_si512(words + 16, _mm512_permutex2var_epi64((__m512i)first, high, (__m512i)last));
#else
    for (int i = 0; i < LANES; ++i) {
        const u64 block[2] = {first[i], last[i]};
        std::memcpy(words + 4 * i, block, sizeof block);
    }
#endif
}

// GROUPS * LANES blocks from `first` on: a round waits for the one before it, so a processor likes several groups at a time.
template <int GROUPS> inline void group(const Stream& s, Lanes first, const Lanes* k0, const Lanes* k1, u32* words) {
    Lanes c0[GROUPS], c1[GROUPS], c2[GROUPS], c3[GROUPS];
    for (int g = 0; g < GROUPS; ++g) {
        c0[g] = first + u64(g * LANES), c1[g] = c0[g] >> 32;
        c2[g] = (first & 0) + s.leaf, c3[g] = (first & 0) + s.query;
    }
    for (int round = 0; round < 10; ++round)
        for (int g = 0; g < GROUPS; ++g) {
            const Lanes p0 = product(c0[g], 0xD2511F53u), p1 = product(c2[g], 0xCD9E8D57u);
            c0[g] = high(p1) ^ c1[g] ^ k0[round], c1[g] = p1;
            c2[g] = high(p0) ^ c3[g] ^ k1[round], c3[g] = p0;
        }
    for (int g = 0; g < GROUPS; ++g)
        store_blocks((c0[g] & 0xFFFFFFFFu) | (c1[g] << 32), (c2[g] & 0xFFFFFFFFu) | (c3[g] << 32), words + 4 * LANES * g);
}

// Blocks first ... first + count of a stream, count a multiple of LANES: four words each, in order.
void blocks(const Stream& s, u64 first, i64 count, u32* words) {
    Lanes lane, k0[10], k1[10];
    for (int i = 0; i < LANES; ++i) lane[i] = u64(i);
    for (u32 round = 0; round < 10; ++round) {
        k0[round] = (lane & 0) + u64(s.k0 + round * 0x9E3779B9u);
        k1[round] = (lane & 0) + u64(s.k1 + round * 0xBB67AE85u);
    }
    i64 b = 0;
    for (; b + TOGETHER * LANES <= count; b += TOGETHER * LANES)
        group<TOGETHER>(s, lane + (first + u64(b)), k0, k1, words + 4 * b);
    for (; b < count; b += LANES) group<1>(s, lane + (first + u64(b)), k0, k1, words + 4 * b);
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

// distributions._radius: sqrt(-2 ln u) for u = (2 low half + 1) / 2**17
inline float radius(u32 word) {
    const u32 u = bits<u32>(float(int((word & 0xFFFFu) * 2u + 1u)) * 0x1p-17f);
    const int exponent = int(u - 0x3F3504F3u) >> 23; // of u = mantissa * 2**exponent, mantissa in [sqrt(1/2), sqrt(2))
    const float x = bits<float>(u - (u32(exponent) << 23)) - 1.0f;
    const float square = x * x; // -2 ln(1 + x) / x by three lines at once, which is faster than one after another
    const float y = ((0.28674802f * x + -0.44629266f) * square + (0.50928687f * x + -0.66456061f)) * square +
                    (0.99971165f * x + -2.000024f);
    return std::sqrt(float(exponent) * -1.3862944f + y * x);
}

// distributions._cos_sin: 13 bits are the angle in (0, pi/4), the three highest choose among its eight images
inline void cos_sin(u32 word, float& cos, float& sin) {
    const float angle = float(int((word >> 15 & 0x3FFEu) | 1u)) * float(0.7853981633974483 / 16384.0);
    const float square = angle * angle;
    const float sine = (0.00815299f * square + -0.16662834f) * square * angle + angle;
    const float cosine = ((-0.00135978f * square + 0.04165629f) * square + -0.49999895f) * square + 1.0f;
    const bool swap = word & (1u << 29);
    const float c = swap ? sine : cosine, s = swap ? cosine : sine;
    cos = bits<float>(bits<u32>(c) | (word & 0x80000000u));
    sin = bits<float>(bits<u32>(s) | (word << 1 & 0x80000000u));
}

template <bool ADD> void put_gaussian(const u32* words, i64 count, float c, float* tile) {
    for (i64 i = 0; i < count; ++i) {
        float cos, sin;
        const float r = radius(words[i]);
        cos_sin(words[i], cos, sin);
        const float first = r * cos * c, second = r * sin * c;
        tile[2 * i] = ADD ? tile[2 * i] + first : first;
        tile[2 * i + 1] = ADD ? tile[2 * i + 1] + second : second;
    }
}

struct Noise {
    int kind;
    const Term* terms;
    i64 count;
    u32 leaf;

    // tile[e % TILE] = sum of c z(e) for e in [begin, end), which lie in one tile; a query given replaces the terms'.
    void operator()(i64 begin, i64 end, float* tile, const i64* query = nullptr) const {
        const i64 per_block = kind == RADEMACHER ? 128 : 8, span = LANES * per_block;
        const i64 from = begin / span * span, to = (end + span - 1) / span * span, n = (to - from) / per_block;
        float* place = tile + from % TILE;
        if (!count) std::fill(place, place + (to - from), 0.0f);
        u32 words[TILE / 2];
        for (i64 k = 0; k < count; ++k) {
            const Term& t = terms[k];
            blocks({t.k0, t.k1, leaf, query ? u32(*query) : t.query}, u64(from / per_block), n, words);
            if (kind == RADEMACHER)
                (k ? put_rademacher<true> : put_rademacher<false>)(words, 4 * n, t.coefficient, place);
            else
                (k ? put_gaussian<true> : put_gaussian<false>)(words, 4 * n, t.coefficient, place);
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

// Ask for what the next tile will read. (A sweep in place is no faster for it.)
template <class T> inline void prefetch(const T* at) {
    for (i64 i = TILE; i < 2 * TILE; i += 64 / i64(sizeof(T))) __builtin_prefetch(at + i);
}

// ------------------------------------------------------------------------------------------------------------ sweeps

// Thirty-two elements at a time, by the machine's own instructions, for as long as they can: each of these gives the bits of
// the plain loop behind it, and returns how many elements it did.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
struct Wide { // the first sixteen and the others
    __m512 low, high;
};

template <class F> inline Wide both(const F& f, const Wide& a, const Wide& b) { return {f(a.low, b.low), f(a.high, b.high)}; }

inline __m512 sum(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512 difference(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }

struct Signs { // z of Rademacher noise, from its bits
    const u32* words;
    __m512 plus, minus;
    Wide operator()(i64 i) const {
        const u32 word = words[i / 32];
        return {_mm512_mask_blend_ps(__mmask16(word), plus, minus), _mm512_mask_blend_ps(__mmask16(word >> 16), plus, minus)};
    }
};

inline Wide load(const float* from) { return {_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)}; }

struct Sums { // z that lies in a tile
    const float* z;
    Wide operator()(i64 i) const { return load(z + i); }
};

template <class T> constexpr bool wide = std::is_same_v<T, float> || std::is_same_v<T, BFloat16>;

inline __m512i load16(const void* from) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)); }
inline Wide load(const BFloat16* from) {
    const auto whole = [](__m512i raw) { return _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)); };
    return {whole(load16(from)), whole(load16(from + 16))};
}

inline void store(const Wide& value, float* to) {
    _mm512_storeu_ps(to, value.low);
    _mm512_storeu_ps(to + 16, value.high);
}
inline void store(const Wide& value, BFloat16* to) {
    const __m512i nearest = (__m512i)_mm512_cvtne2ps_pbh(value.high, value.low);
    _mm512_storeu_si512(to, nearest);
    if (_mm512_testn_epi16_mask(nearest, _mm512_set1_epi16(0x7FFF))) // subnormal numbers, too, are zeros to the instruction
        for (int i = 0; i < 16; ++i) to[i] = BFloat16(value.low[i]), to[i + 16] = BFloat16(value.high[i]);
}

template <class Z, class In, class Out> i64 perturb_wide(const In* in, const Z& z, i64 count, Out* to) {
    if constexpr (!wide<In> || !wide<Out>) return 0;
    else {
        i64 i = 0;
        for (; i + 32 <= count; i += 32) store(both(sum, load(in + i), z(i)), to + i);
        return i;
    }
}

template <class Z, class In, class Out> i64 perturb_both_wide(const In* in, const Z& z, i64 count, Out* plus, Out* minus) {
    if constexpr (!wide<In> || !wide<Out>) return 0;
    else {
        i64 i = 0;
        for (; i + 32 <= count; i += 32) {
            const Wide stored = load(in + i), noise = z(i);
            store(both(sum, stored, noise), plus + i);
            store(both(difference, stored, noise), minus + i);
        }
        return i;
    }
}

template <bool FUSED, class Z, class T>
i64 sgd_wide(const Z& z, const Bits16* random, float step, float decay, i64 count, T* target) {
    if constexpr (!wide<T>) return 0;
    else {
        const auto add = [](__m512 a, __m512 x, __m512 alpha) {
            return FUSED ? _mm512_fmadd_ps(x, alpha, a) : _mm512_add_ps(a, _mm512_mul_ps(x, alpha));
        };
        const __m512 by = _mm512_set1_ps(step), weight_decay = _mm512_set1_ps(decay);
        const auto updated = [&](__m512 old, __m512 plain) {
            return add(old, decay != 0.0f ? add(plain, old, weight_decay) : plain, by);
        };
        const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF), largest = _mm512_set1_epi32(0x7F7F0000);
        u16 places[32]; // of the high halves of thirty-two numbers of 32 bits
        for (int i = 0; i < 32; ++i) places[i] = u16(2 * i + 1);
        const __m512i high_halves = _mm512_loadu_si512(places);
        i64 i = 0;
        for (; i + 32 <= count; i += 32) {
            const Wide value = both(updated, load(target + i), z(i));
            if constexpr (sizeof(T) == 4) store(value, target + i);
            else {
                const __m512i low = _mm512_castps_si512(value.low), high = _mm512_castps_si512(value.high);
                const __m512i most = _mm512_max_epu32(_mm512_and_si512(low, magnitude), _mm512_and_si512(high, magnitude));
                if (_mm512_cmpgt_epu32_mask(most, largest)) return i;
                const __m512i a = _mm512_add_epi32(low, load16(random + i)), b = _mm512_add_epi32(high, load16(random + i + 16));
                _mm512_storeu_si512(target + i, _mm512_permutex2var_epi16(a, high_halves, b));
            }
        }
        return i;
    }
}

// f(z) for the elements from `begin` to the end of its tile, if z is the signs of one direction
template <class F> i64 on_signs(const Noise& noise, i64 begin, const F& f) {
    if (noise.kind != RADEMACHER || noise.count != 1 || begin % 32) return 0;
    const Term& t = noise.terms[0];
    u32 words[TILE / 32];
    blocks({t.k0, t.k1, noise.leaf, t.query}, u64(begin / TILE * (TILE / 128)), TILE / 128, words);
    return f(Signs{words + begin % TILE / 32, _mm512_set1_ps(t.coefficient), _mm512_set1_ps(-t.coefficient)});
}
#else
struct Sums {
    const float* z;
};
template <class... A> i64 perturb_wide(const A&...) { return 0; }
template <class... A> i64 perturb_both_wide(const A&...) { return 0; }
template <bool FUSED, class... A> i64 sgd_wide(const A&...) { return 0; }
template <class F> i64 on_signs(const Noise&, i64, const F&) { return 0; }
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
        prefetch(in);
        i64 i = on_signs(noise, begin, [&](const auto& z) { return perturb_wide(in, z, count, to); });
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
        prefetch(in);
        i64 i = on_signs(noise, begin, [&](const auto& z) { return perturb_both_wide(in, z, count, up, down); });
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

// a + x * alpha as torch.add rounds it: once where its kernels use fused multiply-add, else twice
template <bool FUSED, class W> inline W add(W a, W x, W alpha) {
    if constexpr (FUSED) return std::fma(x, alpha, a);
    else return a + x * alpha;
}

template <class T, bool FUSED>
void sgd(const Noise& like, const Stream& rounding_like, const Run* runs, i64 n, double lr, double decay, int threads) {
    using Work = typename Working<T>::type;
    const Work step = Work(-lr), weight_decay = Work(decay);
    const bool decays = decay != 0.0;
    sweep_runs(runs, n, threads, [&](const Run& run, i64 begin, i64 end) {
        Noise noise = like;
        Stream rounding = rounding_like;
        noise.leaf = rounding.leaf = u32(run.leaf);
        T* w = static_cast<T*>(run.data) + (begin - run.start);
        const i64 count = end - begin;
        alignas(64) u32 words[TILE / 2];
        const Bits16* random = nullptr;
        if constexpr (sizeof(T) == 2) random = rounding_bits(rounding, begin, end, words);
        const auto fast = [&](const auto& z) { return sgd_wide<FUSED>(z, random, float(step), float(weight_decay), count, w); };
        i64 i = on_signs(noise, begin, fast);
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

// out[i, j] = sum over k, in order, of a[k, i] * b[k, j]: a library's product would sum in an order of its own
void outer_sum(const float* a, const float* b, i64 count, i64 rows, i64 columns, float* out, int threads) {
    constexpr i64 SPAN = 256; // columns at a time, so that those of b stay in the first-level cache
    parallel_for(rows, std::max(i64(1), GRAIN / columns), threads, [&](i64 first, i64 last) {
        for (i64 left = 0; left < columns; left += SPAN) {
            const i64 width = std::min(SPAN, columns - left);
            for (i64 i = first; i < last; ++i) {
                float sum[SPAN] = {};
                for (i64 k = 0; k < count; ++k) {
                    const float factor = a[k * rows + i];
                    const float* row = b + (k * columns + left);
                    ELEMENTWISE
                    for (i64 j = 0; j < width; ++j) sum[j] += factor * row[j];
                }
                std::memcpy(out + (i * columns + left), sum, size_t(width) * sizeof(float));
            }
        }
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
        const auto update = fused ? sgd<T, (sizeof(T) > 2)> : sgd<T, false>;
        update(noise, rounding, runs, n, lr, decay, threads);
    });
}

void zol_outer_sum(const float* a, const float* b, i64 count, i64 rows, i64 columns, float* out, int threads) {
    outer_sum(a, b, count, rows, columns, out, threads);
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
