// Dropout of probabilities, by a counter-based generator: a pair's fate depends on (seed, b, h, i, j) alone.
//   value        p = p * z,  z = 65536 / keep where the pair's 16 random bits are below keep, else 0
//   derivative   dp = z * (dout . v), dv = sum p z dout
// Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) of the counter (j / 8, i, h, b) and
// the key `seed` gives the bits of the eight pairs (i, 8 (j / 8)) and on, the low half of each word first.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "target.h"

namespace heedful::HEEDFUL_TARGET {

constexpr int kPairsPerCounter = 8;

// Word: lanes of 64 bits, of which the low 32 count. multiply(word, constant) multiplies the low halves to 64 bits.
template <class Word>
struct Counter {
  Word word[4];
};

template <class Word, class Multiply>
HEEDFUL_FN Counter<Word> philox(Counter<Word> c, uint64_t seed, Multiply multiply) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Word p0 = multiply(c.word[0], 0xD2511F53u), p1 = multiply(c.word[2], 0xCD9E8D57u);
    c = {{(p1 >> 32) ^ c.word[1] ^ uint64_t(key0), p1, (p0 >> 32) ^ c.word[3] ^ uint64_t(key1), p0}};
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return c;
}

HEEDFUL_FN uint64_t seed_of(const Problem& p, int64_t b) { return uint64_t(p.seeds[b * p.seeds_stride]); }

HEEDFUL_FN bool has_dropout(const Problem& p) { return p.keep < kKeepAll; }

// z of a pair that is kept.
HEEDFUL_FN double kept_weight(const Problem& p) { return p.keep ? double(kKeepAll) / p.keep : 0.0; }

}  // namespace heedful::HEEDFUL_TARGET
