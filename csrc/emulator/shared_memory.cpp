#include "shared_memory.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "sm90/ordered_words.h"

namespace heedful::emulator {
namespace {

std::string thread_name(int thread) { return "thread " + std::to_string(thread); }

// Whether what a thread did at a time comes before what `by` does now.
bool ordered(int thread, int64_t block_epoch, int64_t warp_epoch, const Access& by) {
  if (thread == by.thread && !by.whole_warp) return true;
  if (block_epoch < by.block_epoch) return true;
  return thread / 32 == by.thread / 32 && warp_epoch < by.warp_epoch;
}

}  // namespace

void SharedMemory::reset(uint32_t bytes, OrderedWords* ordered) {
  bytes_.assign(bytes, 0xff);
  ordered_ = ordered;
  words_.assign(ordered ? 0 : (bytes + 3) / 4, Word());
}

void SharedMemory::check_bounds(uint32_t address, uint32_t bytes, const Access& by) const {
  const std::string what = "shared memory access of " + std::to_string(bytes) + " bytes at " + std::to_string(address) +
                           " by " + thread_name(by.thread) + ", " + text(by.where);
  if (uint64_t(address) + bytes > bytes_.size())
    throw Fault("out of bounds: " + what + ": the block has " + std::to_string(bytes_.size()));
  if (address % std::min(bytes, 16u)) throw Fault("misaligned: " + what);
}

void SharedMemory::read(uint32_t address, void* to, uint32_t bytes, const Access& by) {
  check_bounds(address, bytes, by);
  if (ordered_) ordered_->read(address, bytes, by);
  for (uint32_t a = address / 4 * 4; !ordered_ && a < address + bytes; a += 4) {
    Word& word = word_at(a);
    if (word.copier != kNobody)
      throw Fault("race: shared word " + std::to_string(a) + " is read by " + thread_name(by.thread) + ", " +
                  text(by.where) + ", while a copy of " + thread_name(word.copier) + ", " + text(word.copied) +
                  ", is in flight to it");
    if (word.writer != kNobody && !ordered(word.writer, word.write_block, word.write_warp, by))
      throw Fault("race: shared word " + std::to_string(a) + " is read by " + thread_name(by.thread) + ", " +
                  text(by.where) + ", without a barrier after the write of " + thread_name(word.writer) + ", " +
                  text(word.written));
    const bool same_block_epoch = word.reader != kNobody && word.read_block == by.block_epoch;
    const bool same_warp = same_block_epoch && word.reader / 32 == by.thread / 32;
    word.many_warps = same_block_epoch && (word.many_warps || !same_warp);
    word.many_readers = by.whole_warp || (same_warp && word.read_warp == by.warp_epoch &&
                                          (word.many_readers || word.reader != by.thread));
    word.reader = by.thread, word.read_block = by.block_epoch, word.read_warp = by.warp_epoch, word.read = by.where;
  }
  std::memcpy(to, &bytes_[address], bytes);
}

void SharedMemory::check_write(const Word& word, uint32_t address, const Access& by) const {
  const auto fail = [&](const std::string& against) {
    throw Fault("race: shared word " + std::to_string(address) + " is written by " + thread_name(by.thread) + ", " +
                text(by.where) + ", " + against);
  };
  if (word.copier != kNobody)
    fail("while a copy of " + thread_name(word.copier) + ", " + text(word.copied) + ", is in flight to it");
  if (word.writer != kNobody && !ordered(word.writer, word.write_block, word.write_warp, by))
    fail("without a barrier after the write of " + thread_name(word.writer) + ", " + text(word.written));
  if (word.reader == kNobody || word.read_block < by.block_epoch) return;
  const bool after_readers = word.reader == by.thread ? !word.many_readers || word.read_warp < by.warp_epoch
                                                      : ordered(word.reader, word.read_block, word.read_warp, by);
  if (word.many_warps || !after_readers)
    fail("without a barrier after the read of " + thread_name(word.reader) + ", " + text(word.read));
}

void SharedMemory::write(uint32_t address, const void* from, uint32_t bytes, const Access& by) {
  check_bounds(address, bytes, by);
  if (ordered_) ordered_->write(address, bytes, by);
  // Two threads may write the two halves of a word: the check is as strict as if it were one.
  for (uint32_t a = address / 4 * 4; !ordered_ && a < address + bytes; a += 4) {
    Word& word = word_at(a);
    const bool half = bytes < 4 && word.writer != kNobody && word.writer / 32 == by.thread / 32;
    if (!half) check_write(word, a, by);
    word.writer = by.thread, word.write_block = by.block_epoch, word.write_warp = by.warp_epoch;
    word.written = by.where;
  }
  std::memcpy(&bytes_[address], from, bytes);
}

void SharedMemory::begin_copy(uint32_t address, uint32_t bytes, const Access& by) {
  check_bounds(address, bytes, by);
  if (ordered_) ordered_->begin_copy(address, bytes, by);
  for (uint32_t a = address; !ordered_ && a < address + bytes; a += 4) {
    Word& word = word_at(a);
    check_write(word, a, by);
    word.copier = by.thread, word.copied = by.where;
  }
  std::memset(&bytes_[address], 0xff, bytes);  // what was there is gone
}

void SharedMemory::land(uint32_t address, const void* from, uint32_t bytes) {
  std::memcpy(&bytes_[address], from, bytes);
}

void SharedMemory::end_copy(uint32_t address, uint32_t bytes, const Access& by) {
  if (ordered_) ordered_->end_copy(address, bytes, by);
  for (uint32_t a = address; !ordered_ && a < address + bytes; a += 4) {
    Word& word = word_at(a);
    word.copier = kNobody;
    word.writer = by.thread, word.write_block = by.block_epoch, word.write_warp = by.warp_epoch;
    word.written = by.where;
  }
}

// A wavefront serves 32 banks of 4 bytes, one word of each. Accesses of 8 bytes go by half warps, of 16 by quarters.
void Traffic::add(const std::array<int64_t, 32>& addresses, int bytes) {
  const int group = bytes <= 4 ? 32 : 128 / bytes;
  for (int first = 0; first < 32; first += group) {
    std::set<int64_t> words[32];
    for (int lane = first; lane < first + group; ++lane)
      for (int64_t w = 0; addresses[size_t(lane)] >= 0 && w < (bytes + 3) / 4; ++w) {
        const int64_t word = addresses[size_t(lane)] / 4 + w;
        words[word % 32].insert(word);
      }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    wavefronts += int64_t(most);
    least += most > 0;
  }
}

}  // namespace heedful::emulator
