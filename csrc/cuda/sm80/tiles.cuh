// Tiles of rows of 16-bit numbers in shared memory, and products of them.
//
// A row of kDim numbers is kDim / 8 chunks of 16 bytes; chunk c of row r lies at c ^ (r & 7), so that the eight rows
// that ldmatrix takes at once, and the eight chunks that copies write at once, are in different banks.
#pragma once

#include "../pair.h"
#include "config.h"

namespace heedful::HEEDFUL_TARGET {

using namespace heedful::cuda;  // the configurations

template <int kDim>
constexpr uint32_t kPitch = kDim * 2;

// Whether every row starts at a multiple of 16 bytes and goes on without gaps.
HEEDFUL_FN bool is_aligned(const View& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[3] == 1 && x.stride[0] % 8 == 0 &&
         x.stride[1] % 8 == 0 && x.stride[2] % 8 == 0;
}

// Whether plain kernels compute all of it.
HEEDFUL_FN bool is_plain(const Problem& p) {
  return p.scale > 1e-20 && !p.scales.data && p.similarity == Similarity::dot && p.normalizer == Normalizer::softmax &&
         p.softcap == 0 && !p.bias.data && !has_distances(p) && !p.mask.data && !p.tiles.data && !p.sinks.data &&
         !has_dropout(p) && is_aligned(p.q) && is_aligned(p.k) && is_aligned(p.v);
}

// Takes rows of a matrix to tiles of kDim columns, zeros where there are none. Each thread copies one chunk of every
// kRowsPerPass-th row.
template <class S, int kDim>
struct TileLoader {
  static constexpr int kChunks = kDim / 8, kRowsPerPass = kThreads / kChunks;

  const View& view;
  const bool aligned;
  const int row;  // this thread's row in the first pass
  const S* from;  // that row's first one of this thread's eight columns
  uint32_t to;    // its place in a tile
  int columns;    // how many of the eight there are

  HEEDFUL_DEVICE TileLoader(const View& of, int64_t batch, int64_t head, int64_t row0, int64_t dim, bool is_aligned)
      : view(of), aligned(is_aligned), row(thread_index() / kChunks) {
    const int chunk = thread_index() % kChunks;
    from = row_of<const S>(view, batch, head, row0 + row) + chunk * 8 * view.stride[3];
    to = uint32_t(row) * kPitch<kDim> + uint32_t(chunk ^ (row & 7)) * 16;
    columns = int(clamp(dim - chunk * 8, 0, 8));
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
    const uint32_t address = tile + (to ^ swizzle) + uint32_t(pass * kRowsPerPass) * kPitch<kDim>;
    const int present = exists ? columns : 0;
    if (!kMayBeUnaligned || aligned)
      copy_async(address, x, 2 * present);
    else
      store_shared(address, gather(x, present));
  }
  HEEDFUL_DEVICE uint4 gather(const S* x, int present) const {
    uint32_t words[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const uint32_t low = 2 * n < present ? load_global(x + 2 * n * view.stride[3]).bits : 0;
      const uint32_t high = 2 * n + 1 < present ? load_global(x + (2 * n + 1) * view.stride[3]).bits : 0;
      words[n] = low | high << 16;
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

// Where a lane finds its row of the 16 x 16 parts of a tile, for ldmatrix. The address of the part at rows 16 r and
// columns 16 c is (lane address ^ 32 c) + 16 r rows: the low bit of the chunk is the lane's own.
template <int kDim>
HEEDFUL_DEVICE uint32_t lane_address(int row, int half) {
  return uint32_t(row) * kPitch<kDim> + uint32_t(half ^ (row & 7)) * 16;
}
// As a mma's a: matrices are rows 0-7, rows 8-15, and again for columns 8-15. Transposed, as its b.
template <int kDim>
HEEDFUL_DEVICE uint32_t rows_first(int lane) {
  return lane_address<kDim>(lane & 15, lane >> 4);
}
// As its b: rows 0-7, again for columns 8-15, rows 8-15.
template <int kDim>
HEEDFUL_DEVICE uint32_t columns_first(int lane) {
  return lane_address<kDim>((lane & 7) + (lane >> 4 << 3), lane >> 3 & 1);
}

// c [16 kM][8 kN] += a b^T, both tiles of kDim columns; lane addresses as by rows_first and columns_first.
template <class S, int kDim, int kM, int kN>
HEEDFUL_DEVICE void multiply_transposed(float (&c)[kM][kN][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t rows[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ldmatrix(rows[m], (a ^ uint32_t(32 * k)) + uint32_t(16 * m) * kPitch<kDim>);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t columns[4];
      ldmatrix(columns, (b ^ uint32_t(32 * k)) + uint32_t(8 * n) * kPitch<kDim>);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<S>(c[m][n], rows[m], columns[0], columns[1]);
        mma<S>(c[m][n + 1], rows[m], columns[2], columns[3]);
      }
    }
  }
}

// c [16 kM][kDim] += a b: a [16 kM][8 kK] in registers, as a product left it; b a tile, lane address as by rows_first.
template <class S, int kDim, int kM, int kK>
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
      ldmatrix_transposed(columns, (b ^ uint32_t(16 * n)) + uint32_t(8 * k) * kPitch<kDim>);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<S>(c[m][n], rows[m], columns[0], columns[1]);
        mma<S>(c[m][n + 1], rows[m], columns[2], columns[3]);
      }
    }
  }
}

// Stores a warp's results as rows of `view` from `to` on, of which `rows` exist, but for those whose bits are set in
// `skip`. They go by way of `tile`, rows of a tile in shared memory that nobody reads any more, so that whole rows go
// out.
template <class S, int kDim, int kM>
HEEDFUL_DEVICE void store_rows(const float (&x)[kM][kDim / 8][4], uint32_t tile, const View& view, S* to, int rows,
                               int64_t dim, uint32_t skip) {
  constexpr int kChunks = kDim / 8;
  const int lane = thread_index() % 32;
  sync_warp();
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = 16 * m + 8 * r + lane / 4;
#pragma unroll
      for (int n = 0; n < kChunks; ++n)
        store_shared(tile + uint32_t(at) * kPitch<kDim> + uint32_t(n ^ (at & 7)) * 16 + uint32_t(lane % 4) * 4,
                     pack<S>(x[m][n][2 * r], x[m][n][2 * r + 1]));
    }
  sync_warp();
  const bool aligned = is_aligned(view);
#pragma unroll 2
  for (int n = lane; n < 16 * kM * kChunks; n += 32) {
    const int at = n / kChunks, chunk = n % kChunks;
    if (at >= rows || skip >> at & 1) continue;
    const uint4 words = load_shared<uint4>(tile + uint32_t(at) * kPitch<kDim> + uint32_t(chunk ^ (at & 7)) * 16);
    S* const y = to + at * view.stride[2] + chunk * 8;
    if (aligned && chunk * 8 + 8 <= int(dim)) {
      store_global(reinterpret_cast<uint4*>(y), words);
    } else {
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int c = 0; c < 8; ++c)
        if (chunk * 8 + c < int(dim)) store_global(y + c, S{uint16_t(pairs[c / 2] >> (16 * (c % 2)))});
    }
  }
}

}  // namespace heedful::HEEDFUL_TARGET
