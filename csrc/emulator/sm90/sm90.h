// All that a block needs for instructions of sm_90a, and when its asynchronous work is done: by the seed, as soon as it
// is issued, as late as it can be, or at any time between.
#pragma once

#include "bulk_copies.h"
#include "clocks.h"
#include "mbarrier.h"
#include "named_barriers.h"
#include "ordered_words.h"
#include "register_pool.h"
#include "wgmma.h"

namespace heedful::emulator {

class Sm90 {
 public:
  explicit Sm90(Block& block)
      : clocks(block.grid().threads),
        words(block.grid().shared_bytes, clocks),
        mbarriers(block, clocks),
        named_barriers(block, clocks),
        bulk_copies(block, *this),
        wgmma(block, *this),
        registers(block),
        block_(block),
        pace_(Pace((machine().seed + uint64_t(block.index)) % 3)) {}

  Clocks clocks;
  OrderedWords words;
  Mbarriers mbarriers;
  NamedBarriers named_barriers;
  BulkCopies bulk_copies;
  Wgmma wgmma;
  RegisterPool registers;

  bool early() const { return pace_ == Pace::early; }
  // Between two threads' turns; idle: where no thread can go on.
  void pass_time(bool idle);
  void check_leaving(int thread) const;
  void end();
  std::string describe() const;

 private:
  enum class Pace { early, late, any };
  Block& block_;
  Pace pace_;
};

}  // namespace heedful::emulator
