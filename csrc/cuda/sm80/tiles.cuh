// Tiles of rows of numbers in shared memory, and products of them: of 16-bit numbers, or of float32 as TensorFloat-32.
//
// A row is chunks of 16 bytes; chunk c of row r lies at c ^ (r & 7), so that the eight rows that ldmatrix takes at
// once, and the eight chunks that copies write at once, are in different banks. To ldmatrix a number of float32 is a
// pair of 16-bit ones: it gives what mma wants of either.
#pragma once

#include "../pair.h"
#include "config.h"

namespace heedful::HEEDFUL_TARGET {

using namespace heedful::cuda;  // the configurations

template <class S>
constexpr int kPerChunk = 16 / sizeof(S);
template <class S, int kDim>
constexpr uint32_t kPitch = kDim * sizeof(S);
template <class S>
constexpr bool kTf32 = sizeof(S) == 4;

// Whether every row starts at a multiple of 16 bytes and goes on without gaps.
template <class S>
HEEDFUL_FN bool is_aligned(const View& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[3] == 1 && x.stride[0] % kPerChunk<S> == 0 &&
         x.stride[1] % kPerChunk<S> == 0 && x.stride[2] % kPerChunk<S> == 0;
}

// Whether plain kernels compute all of it.
template <class S>
HEEDFUL_FN bool is_plain(const Problem& p) {
  return p.scale > 1e-20 && !p.scales.data && p.similarity == Similarity::dot && p.normalizer == Normalizer::softmax &&
         p.softcap == 0 && !p.bias.data && !has_distances(p) && !p.mask.data && !p.tiles.data && !p.sinks.data &&
         !has_dropout(p) && is_aligned<S>(p.q) && is_aligned<S>(p.k) && is_aligned<S>(p.v);
}

// Takes rows of a matrix to tiles of kDim columns, zeros where there are none. Each thread copies one chunk of every
// kRowsPerPass-th row.
template <class S, int kDim>
struct TileLoader {
  static constexpr int kNumbers = kPerChunk<S>, kChunks = kDim / kNumbers, kRowsPerPass = kThreads / kChunks;

  const View& view;
  const bool aligned;
  const int row;  // this thread's row in the first pass
  const S* from;  // that row's first one of this thread's columns
  uint32_t to;    // its place in a tile
  int columns;    // how many of the chunk's there are

  HEEDFUL_DEVICE TileLoader(const View& of, int64_t batch, int64_t head, int64_t row0, int64_t dim, bool is_aligned)
      : view(of), aligned(is_aligned), row(thread_index() / kChunks) {
    const int chunk = thread_index() % kChunks;
    from = row_of<const S>(view, batch, head, row0 + row) + chunk * kNumbers * view.stride[3];
    to = uint32_t(row) * kPitch<S, kDim> + uint32_t(chunk ^ (row & 7)) * 16;
    columns = int(clamp(dim - chunk * kNumbers, 0, kNumbers));
  }

  // Rows [first, first + kRows), of which those below `end` exist.
  template <int kRows, bool kMayBeUnaligned>
  HEEDFUL_DEVICE void load(uint32_t tile, int first, int end) const {
    const S* x = from + first * view.stride[2];
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass, x += kRowsPerPass * view.stride[2])
      copy<kMayBeUnaligned>(tile, pass, x, first + row + pass * kRowsPerPass < end);
  }
  // The same of rows that follow no stride: row n lies `place(n)` numbers after row 0.
  template <int kRows, bool kMayBeUnaligned, class Place>
  HEEDFUL_DEVICE void load(uint32_t tile, int first, int end, Place place) const {
    const S* x = from - row * view.stride[2];
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
      const int n = first + row + pass * kRowsPerPass;
      copy<kMayBeUnaligned>(tile, pass, x + place(n), n < end);
    }
  }
  template <bool kMayBeUnaligned>
  HEEDFUL_DEVICE void copy(uint32_t tile, int pass, const S* x, bool exists) const {
    // Four rows on, the low three bits of the row have changed by 4.
    const uint32_t swizzle = kRowsPerPass == 4 && pass % 2 ? 64 : 0;
    const uint32_t address = tile + (to ^ swizzle) + uint32_t(pass * kRowsPerPass) * kPitch<S, kDim>;
    const int present = exists ? columns : 0;
    if (!kMayBeUnaligned || aligned)
      copy_async(address, x, int(sizeof(S)) * present);
    else
      store_shared(address, gather(x, present));
  }
  HEEDFUL_DEVICE uint4 gather(const S* x, int present) const {
    uint32_t words[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if constexpr (kTf32<S>) {
        words[n] = n < present ? bits_of(load_global(x + n * view.stride[3])) : 0;
      } else {
        const uint32_t low = 2 * n < present ? load_global(x + 2 * n * view.stride[3]).bits : 0;
        const uint32_t high = 2 * n + 1 < present ? load_global(x + (2 * n + 1) * view.stride[3]).bits : 0;
        words[n] = low | high << 16;
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

// Where a lane finds its row of the parts of a tile, of 16 rows and two chunks, for ldmatrix. The address of the part
// at rows 16 r and chunks 2 c is (lane address ^ 32 c) + 16 r rows: the low bit of the chunk is the lane's own.
template <class S, int kDim>
HEEDFUL_DEVICE uint32_t lane_address(int row, int half) {
  return uint32_t(row) * kPitch<S, kDim> + uint32_t(half ^ (row & 7)) * 16;
}
// As a mma's a: matrices are rows 0-7, rows 8-15, and again for the second chunk. Transposed, as its b.
template <class S, int kDim>
HEEDFUL_DEVICE uint32_t rows_first(int lane) {
  return lane_address<S, kDim>(lane & 15, lane >> 4);
}
// As its b: rows 0-7, again for the second chunk, rows 8-15.
template <class S, int kDim>
HEEDFUL_DEVICE uint32_t columns_first(int lane) {
  return lane_address<S, kDim>((lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
}
// For multiply, as its b. ldmatrix transposes pairs of 16 bits only: float32 is read number by number, column lane / 4
// of rows 2 (lane % 4), whose chunks lie in different banks for each of the four, and the next.
template <class S, int kDim>
HEEDFUL_DEVICE uint32_t summed_rows(int lane) {
  if constexpr (!kTf32<S>) return rows_first<S, kDim>(lane);
  return lane_address<S, kDim>(lane % 4 * 2, lane / 16) + uint32_t(lane / 4 % 4) * 4;
}

// What mma takes of numbers as they lie in memory.
template <class S>
HEEDFUL_DEVICE void to_operand(uint32_t (&numbers)[4]) {
  if constexpr (kTf32<S>) {
#pragma unroll
    for (int n = 0; n < 4; ++n) numbers[n] = to_tf32(from_bits(numbers[n]));
  }
}

// c [16 kM][8 kN] += a b^T, both tiles of kDim columns; lane addresses as by rows_first and columns_first.
template <class S, int kDim, int kM, int kN>
HEEDFUL_DEVICE void multiply_transposed(float (&c)[kM][kN][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < kDim / kPerChunk<S> / 2; ++k) {
    uint32_t rows[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ldmatrix(rows[m], (a ^ uint32_t(32 * k)) + uint32_t(16 * m) * kPitch<S, kDim>);
      to_operand<S>(rows[m]);
    }
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t columns[4];
      ldmatrix(columns, (b ^ uint32_t(32 * k)) + uint32_t(8 * n) * kPitch<S, kDim>);
      to_operand<S>(columns);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<S>(c[m][n], rows[m], columns[0], columns[1]);
        mma<S>(c[m][n + 1], rows[m], columns[2], columns[3]);
      }
    }
  }
}

// c [16 kM][kDim] += a b: a [16 kM][8 kK] in registers, as a product left it; b a tile, lane address as by summed_rows.
template <class S, int kDim, int kM, int kK>
  requires(!kTf32<S>)
HEEDFUL_DEVICE void multiply(float (&c)[kM][kDim / 8][4], const float (&a)[kM][kK][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < kK; k += 2) {
    uint32_t rows[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n) rows[m][n] = pack<S>(a[m][k + n / 2][n % 2 * 2], a[m][k + n / 2][n % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t columns[4];
      ldmatrix_transposed(columns, (b ^ uint32_t(16 * n)) + uint32_t(8 * k) * kPitch<S, kDim>);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<S>(c[m][n], rows[m], columns[0], columns[1]);
        mma<S>(c[m][n + 1], rows[m], columns[2], columns[3]);
      }
    }
  }
}

// A product leaves columns 2 t and 2 t + 1 of a to lane t of a row, and the next one takes columns t and t + 4: so
// column t of its a is column 2 t of the tile, column t + 4 is column 2 t + 1, and the rows of its b are those.
template <class S, int kDim, int kM, int kK>
  requires(kTf32<S>)
HEEDFUL_DEVICE void multiply(float (&c)[kM][kDim / 8][4], const float (&a)[kM][kK][4], uint32_t b) {
  const uint32_t next = (b ^ 16) + kPitch<S, kDim>;
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    uint32_t rows[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n) rows[m][n] = to_tf32(a[m][k][n % 2 * 2 + n / 2]);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const uint32_t part = uint32_t(8 * k) * kPitch<S, kDim>;
      const uint32_t b0 = to_tf32(load_shared<float>((b ^ uint32_t(32 * n)) + part));
      const uint32_t b1 = to_tf32(load_shared<float>((next ^ uint32_t(32 * n)) + part));
#pragma unroll
      for (int m = 0; m < kM; ++m) mma<S>(c[m][n], rows[m], b0, b1);
    }
  }
}

// The two neighbours of a row that a product leaves to a lane, in a tile: columns 8 n + 2 (lane % 4) and the next.
template <class S, int kDim>
struct Neighbours {
  uint32_t first, second;  // addresses, of float32
  bool swapped;            // which of the two numbers is first

  HEEDFUL_DEVICE Neighbours(uint32_t tile, int row, int n) {
    const int lane = thread_index() % 32;
    const uint32_t of_row = tile + uint32_t(row) * kPitch<S, kDim>;
    if constexpr (!kTf32<S>) {
      first = second = of_row + uint32_t(n ^ (row & 7)) * 16 + uint32_t(lane % 4) * 4;
      swapped = false;
    } else {
      // Lanes of rows 2 x and 2 x + 1 meet in the banks of a chunk: those of its second half begin with the second one.
      const uint32_t pair = of_row + uint32_t((2 * n + lane % 4 / 2) ^ (row & 7)) * 16 + uint32_t(lane % 2) * 8;
      swapped = lane & 2;
      first = pair + (swapped ? 4 : 0), second = pair + (swapped ? 0 : 4);
    }
  }
  HEEDFUL_DEVICE void store(float x, float y) const {
    if constexpr (!kTf32<S>) {
      store_shared(first, pack<S>(x, y));
    } else {
      store_shared(first, swapped ? y : x);
      store_shared(second, swapped ? x : y);
    }
  }
  HEEDFUL_DEVICE void load(float& x, float& y) const {
    if constexpr (!kTf32<S>) {
      const uint32_t pair = load_shared<uint32_t>(first);
      x = widen(S{uint16_t(pair)}), y = widen(S{uint16_t(pair >> 16)});
    } else {
      const float a = load_shared<float>(first), b = load_shared<float>(second);
      x = swapped ? b : a, y = swapped ? a : b;
    }
  }
};

// Stores a warp's results as rows of `view` from `to` on, of which `rows` exist, but for those whose bits are set in
// `skip`. They go by way of `tile`, rows of a tile in shared memory that nobody reads any more, so that whole rows go
// out.
template <class S, int kDim, int kM>
HEEDFUL_DEVICE void store_rows(const float (&x)[kM][kDim / 8][4], uint32_t tile, const View& view, S* to, int rows,
                               int64_t dim, uint32_t skip) {
  constexpr int kNumbers = kPerChunk<S>, kChunks = kDim / kNumbers;
  const int lane = thread_index() % 32;
  sync_warp();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = 16 * m + 8 * r + lane / 4;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) Neighbours<S, kDim>(tile, at, n).store(x[m][n][2 * r], x[m][n][2 * r + 1]);
    }
  sync_warp();
  const bool aligned = is_aligned<S>(view);
#pragma unroll 2
  for (int n = lane; n < 16 * kM * kChunks; n += 32) {
    const int at = n / kChunks, chunk = n % kChunks;
    if (at >= rows || skip >> at & 1) continue;
    const uint4 words = load_shared<uint4>(tile + uint32_t(at) * kPitch<S, kDim> + uint32_t(chunk ^ (at & 7)) * 16);
    S* const y = to + at * view.stride[2] + chunk * kNumbers;
    if (aligned && chunk * kNumbers + kNumbers <= int(dim)) {
      store_global(reinterpret_cast<uint4*>(y), words);
    } else {
      const uint32_t each[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int c = 0; c < kNumbers; ++c) {
        if (chunk * kNumbers + c >= int(dim)) continue;
        if constexpr (kTf32<S>)
          store_global(y + c, from_bits(each[c]));
        else
          store_global(y + c, S{uint16_t(each[c / 2] >> (16 * (c % 2)))});
      }
    }
  }
}

}  // namespace heedful::HEEDFUL_TARGET
