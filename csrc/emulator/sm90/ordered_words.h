// The checker of races in blocks that use sm_90a: shared_memory.h's epochs know the block's and the warps' barriers
// alone; here every word remembers who has written and read it last, by the clocks of clocks.h. It knows the proxies
// too: what a thread has written, asynchronous instructions may touch only after that thread's fence.
#pragma once

#include "../shared_memory.h"
#include "clocks.h"

namespace heedful::emulator {

// An asynchronous instruction: what it is, and what those who issued it knew.
struct AsyncAccess {
  Stamp stamp;
  const char* instruction;
  const Clock& known;
};

class OrderedWords {
 public:
  OrderedWords(uint32_t bytes, Clocks& clocks) : clocks_(clocks), words_((bytes + 3) / 4) {}

  void read(uint32_t address, uint32_t bytes, const Access& by);
  void write(uint32_t address, uint32_t bytes, const Access& by);
  // copy_async, which is no asynchronous instruction in the sense of the proxies.
  void begin_copy(uint32_t address, uint32_t bytes, const Access& by);
  void end_copy(uint32_t address, uint32_t bytes, const Access& by);
  // An asynchronous read lasts until somebody learns of its stamp.
  void async_read(uint32_t address, uint32_t bytes, const AsyncAccess& by);
  // An asynchronous write: between the two the words belong to nobody.
  void begin_write(uint32_t address, uint32_t bytes, const AsyncAccess& by);
  void end_write(uint32_t address, uint32_t bytes, const Stamp& by);
  // The words of an mbarrier are no memory any more.
  void take(uint32_t address, uint32_t bytes, const Access& by);

 private:
  struct Word {
    Stamp writer;
    bool generic = false;             // written by a thread, not asynchronously
    const char* in_flight = nullptr;  // the instruction that is under way to it
    bool mbarrier = false;
    std::vector<Stamp> readers;  // since it was written
  };
  enum class Kind { read, store, async_write };
  void check(const Word& word, uint32_t address, Kind access, const Stamp& by, const char* instruction,
             const Clock& known) const;
  void check_proxy(const Word& word, uint32_t address, const AsyncAccess& by) const;
  static void add_reader(Word& word, const Stamp& reader);

  Clocks& clocks_;
  std::vector<Word> words_;
};

}  // namespace heedful::emulator
