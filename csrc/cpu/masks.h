// What masks leave of a tile of scores, in bits: a word has 64 keys of one query. Block masks come as such words; bool
// masks and bands are made into them.
#pragma once

#include "../score/blocks.h"
#include "../score/mask.h"
#include "lanes.h"

namespace heedful::HEEDFUL_TARGET {

enum class InLanes { queries, keys };

constexpr int64_t kWord = 64;

// Queries [i0, i1) x keys [j0, j1) of one head.
struct Tile {
  int64_t b, h, i0, i1, j0, j1;
  // What the block mask and the bool mask leave; null where that is all. Those of which this is a part begin at query
  // words_i0 and key words_j0; word [n][i] has the keys from words_j0 + 64 n on of query words_i0 + i.
  const uint64_t (*words)[kMaskTile] = nullptr;
  int64_t words_i0 = 0, words_j0 = 0;
};

// ---- bool masks -----------------------------------------------------------------------------------------------------

// Bit x is set where byte x is not 0.
HEEDFUL_FN uint64_t bits_of_eight(const uint8_t* bytes) {
  uint64_t x;
  __builtin_memcpy(&x, bytes, 8);
  x |= x >> 4, x |= x >> 2, x |= x >> 1;
  // The product moves the lowest bit of byte k, times 2^(56 - 7 k), to 56 + k, and no two bits to the same place.
  return (x & 0x0101010101010101) * 0x0102040810204080 >> 56;
}
HEEDFUL_FN uint64_t bits_of_word(const uint8_t* bytes) {
  uint64_t bits = 0;
#if defined(__AVX512BW__) && HEEDFUL_VECTOR_BYTES == 64
  const __m512i x = _mm512_loadu_si512(bytes);
  bits = _mm512_test_epi8_mask(x, x);
#elif defined(__AVX2__)
  for (int at = 0; at < kWord; at += 32) {
    const __m256i x = _mm256_loadu_si256((const __m256i*)(bytes + at));
    bits |= uint64_t(uint32_t(~_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_setzero_si256())))) << at;
  }
#elif defined(__SSE2__)
  for (int at = 0; at < kWord; at += 16) {
    const __m128i x = _mm_loadu_si128((const __m128i*)(bytes + at));
    bits |= uint64_t(uint16_t(~_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128())))) << at;
  }
#else
  for (int at = 0; at < kWord; at += 8) bits |= bits_of_eight(bytes + at) << at;
#endif
  return bits;
}

// Of `count` bytes, no more than a word's.
HEEDFUL_FN uint64_t bits_of(const uint8_t* bytes, int64_t stride, int64_t count) {
  if (stride == 0) return *bytes ? bits_below(count) : 0;
  if (stride == 1 && count == kWord) return bits_of_word(bytes);
  uint64_t bits = 0;
  int64_t at = 0;
  if (stride == 1)
    for (; at + 8 <= count; at += 8) bits |= bits_of_eight(bytes + at) << at;
  for (; at < count; ++at) bits |= uint64_t(bytes[at * stride] != 0) << at;
  return bits;
}

// Bit c of word r and bit r of word c trade places: halves of the square off its diagonal do, then halves of each half.
HEEDFUL_FN void transpose_bits(uint64_t (&words)[kWord]) {
  uint64_t low = bits_below(kWord / 2);
  for (int step = kWord / 2; step > 0; step /= 2, low ^= low << step)
    for (int a = 0; a < kWord; a = (a + step + 1) & ~step) {
      const uint64_t differ = ((words[a] >> step) ^ words[a + step]) & low;
      words[a] ^= differ << step, words[a + step] ^= differ;
    }
}

// words[i] = the keys [j0, j1) of query t.i0 + i, no more than a word's. `next`: how far on the tile after this one
// lies, for the cache to know: rows are so far apart that it cannot guess.
HEEDFUL_CALLED void load_mask(uint64_t (&words)[kMaskTile], const Problem& p, const Tile& t, int64_t j0, int64_t j1,
                              int64_t next) {
  const View& mask = p.mask;
  const int64_t queries = t.i1 - t.i0, keys = j1 - j0, query_stride = mask.stride[2], key_stride = mask.stride[3];
  const uint8_t* first = static_cast<const uint8_t*>(mask.data) + t.b * mask.stride[0] + t.h * mask.stride[1] +
                         t.i0 * query_stride + j0 * key_stride;
  if (query_stride == 0) {
    const uint64_t bits = bits_of(first, key_stride, keys);
    for (int64_t i = 0; i < queries; ++i) words[i] = bits;
  } else if (query_stride == 1 && key_stride > 1) {
    for (int64_t j = 0; j < kWord; ++j) words[j] = j < keys ? bits_of(first + j * key_stride, 1, queries) : 0;
    transpose_bits(words);
  } else {
    for (int64_t i = 0; i < queries; ++i) {
      const uint8_t* row = first + i * query_stride;
      __builtin_prefetch(row + next, 0, 2);
      words[i] = bits_of(row, key_stride, keys);
    }
  }
}

// ---- both masks -----------------------------------------------------------------------------------------------------

// Whether the block mask and the bool mask leave any pair of the tile. Where they leave some, it has their words. With
// queries in lanes the next tile is one of other keys.
HEEDFUL_CALLED bool find_masks(const Problem& p, InLanes in_lanes, uint64_t (*words)[kMaskTile], Tile* t) {
  const int32_t in_blocks = mask_tile(p, t->b, t->h, t->i0, t->j0);
  if (in_blocks == kEmptyTile) return false;
  const int64_t* bits = mask_bits(p, in_blocks);
  if (!bits && !p.mask.data) return true;
  t->words_i0 = t->i0, t->words_j0 = t->j0;
  const int64_t queries = t->i1 - t->i0;
  const int64_t next =
      in_lanes == InLanes::queries ? (t->j1 - t->j0) * p.mask.stride[3] : (t->i1 - t->i0) * p.mask.stride[2];
  uint64_t any = 0, missing = 0;
  for (int64_t j = t->j0, n = 0; j < t->j1; j += kWord, ++n) {
    const int64_t end = least(t->j1, j + kWord);
    const uint64_t all = bits_below(end - j);
    if (p.mask.data) load_mask(words[n], p, *t, j, end, next);
    for (int64_t i = 0; i < queries; ++i) {
      uint64_t left = p.mask.data ? words[n][i] : all;
      if (bits) left &= uint64_t(bits[t->i0 % kMaskTile + i]) >> t->j0 % kMaskTile;  // then the tile has one word
      words[n][i] = left &= all;
      any |= left, missing |= left ^ all;
    }
  }
  if (missing) t->words = words;
  return any;
}

// ---- scores ---------------------------------------------------------------------------------------------------------

// s[row * stride + lane] = -inf where the band leaves a pair out, for one vector of lanes, the first of which is the
// tile's `lane`, and the rows [from, to). Returns the largest scores, of `top` as well.
template <InLanes in_lanes, class C>
HEEDFUL_FN Vec<C> mask_edge(const Band& band, const Tile& t, int64_t lane, int64_t from, int64_t to, C* s,
                            int64_t stride, Vec<C> top) {
  using I = Int<C>;
  constexpr bool queries_in_lanes = in_lanes == InLanes::queries;
  // What the lanes see, lengths aside, goes up by one row with each.
  const int64_t offset = band.start + t.i0 - t.j0, at = (queries_in_lanes ? offset : -offset) + lane;
  const int64_t before = queries_in_lanes ? band.left : band.right, after = queries_in_lanes ? band.right : band.left;
  const auto limits = [&](int64_t of_first) {
    return iota<I>() + broadcast<I>(I(clamp(of_first, from - kLanes<C>, to)));
  };
  const Vec<I> first = before == kUnbounded ? broadcast<I>(I(from)) : limits(at - before);
  const Vec<I> end = after == kUnbounded ? broadcast<I>(I(to)) : limits(at + after + 1);
  for (int64_t r = from; r < to; ++r) {
    const Vec<I> row = broadcast<I>(I(r));
    const Vec<C> x = select((row >= first) & (row < end), load(s + r * stride), broadcast<C>(-kInfinity<C>));
    store(s + r * stride, x);
    top = maximum(x, top);
  }
  return top;
}

constexpr int64_t kMostQueries = 128;  // of a tile that a band's edge crosses; with masks kMaskTile

// s[row * stride + lane] = -inf where a pair of the tile is absent. `width` is the tile's lanes rounded up to whole
// vectors. With keys in lanes they have to lie in one word.
template <InLanes in_lanes, class C>
HEEDFUL_CALLED void apply_masks(const Band& band, const Tile& t, C* s, int64_t stride, int64_t width) {
  using I = Int<C>;
  constexpr int n = kLanes<C>;
  constexpr int64_t kHalf = kWord / 2;
  const bool banded = !band.covers(t.i0, t.i1, t.j0, t.j1);
  if (!banded && !t.words) return;
  const Vec<C> minus_infinity = broadcast<C>(-kInfinity<C>);
  const auto keep = [&](C* to, Vec<I> bits) { store(to, select(bits == Vec<I>{}, minus_infinity, load(to))); };
  const int64_t queries = t.i1 - t.i0, origin = t.words ? t.words_j0 : t.j0;
  for (int64_t j = t.j0 - (t.j0 - origin) % kWord; j < t.j1; j += kWord) {
    const int64_t first = most<int64_t>(t.j0 - j, 0), end = least(t.j1 - j, kWord);
    const uint64_t* given = t.words ? t.words[(j - origin) / kWord] + (t.i0 - t.words_i0) : nullptr;
    alignas(64) uint64_t words[kMostQueries];
    uint64_t missing = 0;
    for (int64_t i = 0; i < queries; ++i) {
      uint64_t word = given ? given[i] : ~uint64_t{};
      if (banded)
        word &= bits_below(clamp(band.end_key(t.i0 + i) - j, 0, kWord)) &
                ~bits_below(clamp(band.first_key(t.i0 + i) - j, 0, kWord));
      words[i] = word;
      missing |= ~word;
    }
    if (!(missing & bits_below(end) & ~bits_below(first))) continue;

    if constexpr (in_lanes == InLanes::queries) {
      for (int64_t i = queries; i < width; ++i) words[i] = 0;
      for (int64_t half = 0; half < kWord; half += kHalf) {
        alignas(64) I bits[kMaskTile];
        for (int64_t l = 0; l < width; l += n)
          store(bits + l, low_halves<C>(load(words + l) >> half, load(words + l + n - kLanes<uint64_t>) >> half));
        for (int64_t x = most(first, half); x < least(end, half + kHalf); ++x) {
          const Vec<I> bit = broadcast<I>(I(uint64_t{1} << (x - half)));
          for (int64_t l = 0; l < width; l += n) keep(s + (j + x - t.j0) * stride + l, load(bits + l) & bit);
        }
      }
    } else {
      const Vec<I> own_bit = I(1) << iota<I>();
      for (int64_t i = 0; i < queries; ++i)
        for (int64_t l = 0; l < width; l += n)
          keep(s + i * stride + l, broadcast<I>(I(words[i] >> (first + l))) & own_bit);
    }
  }
}

}  // namespace heedful::HEEDFUL_TARGET
