// A block's shared memory: poisoned, bounds and alignment checked, with a checker of races and a count of wavefronts.
//
// Every 32-bit word remembers its last writer and its readers, and when: by the block's barriers passed and the warp's.
// Two accesses of different threads, one of them a write, need a barrier of the block between them, or of their warp
// where both are of one. A word that an asynchronous copy is under way to belongs to nobody until the copy is waited
// for.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "fault.h"

namespace heedful::emulator {

class OrderedWords;

// Who accesses: the barriers that the thread's block and warp have passed stand for the time.
struct Access {
  int thread;  // of the block
  int64_t block_epoch, warp_epoch;
  Where where;
  bool whole_warp = false;  // on behalf of all lanes
};

class SharedMemory {
 public:
  // Blocks that use sm_90a bring their own checker of races.
  void reset(uint32_t bytes, OrderedWords* ordered = nullptr);
  uint32_t size() const { return uint32_t(bytes_.size()); }

  void read(uint32_t address, void* to, uint32_t bytes, const Access& by);
  void write(uint32_t address, const void* from, uint32_t bytes, const Access& by);
  // An asynchronous copy: the words are taken at its issue, and given back when it has been waited for. The bytes land
  // in between, whenever the caller says so.
  void begin_copy(uint32_t address, uint32_t bytes, const Access& by);
  void land(uint32_t address, const void* from, uint32_t bytes);
  void end_copy(uint32_t address, uint32_t bytes, const Access& by);

  // For asynchronous reads and writes, which ordered_words.h has checked.
  const unsigned char* at(uint32_t address) const { return &bytes_[address]; }
  void check_bounds(uint32_t address, uint32_t bytes, const Access& by) const;

 private:
  static constexpr int kNobody = -1;
  struct Word {
    int writer = kNobody, reader = kNobody, copier = kNobody;
    bool many_readers = false, many_warps = false;  // since the reader's barrier of its warp; of the block
    int64_t write_block = -1, write_warp = -1, read_block = -1, read_warp = -1;
    Where written, read, copied;
  };
  void check_write(const Word& word, uint32_t address, const Access& by) const;
  Word& word_at(uint32_t address) { return words_[address / 4]; }

  std::vector<unsigned char> bytes_;
  std::vector<Word> words_;
  OrderedWords* ordered_ = nullptr;
};

// Wavefronts that a warp's shared memory accesses take, and the least that they could take.
struct Traffic {
  int64_t wavefronts = 0, least = 0;
  // One access of a warp: address by lane, below 0 for a lane that takes no part.
  void add(const std::array<int64_t, 32>& addresses, int bytes);
};

}  // namespace heedful::emulator
