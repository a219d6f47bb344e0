// mbarriers: how many threads have to arrive and how many bytes to land before a phase ends, and who may know of it.
#pragma once

#include <map>

#include "../block.h"
#include "clocks.h"

namespace heedful::emulator {

class Mbarriers {
 public:
  Mbarriers(Block& block, Clocks& clocks) : block_(block), clocks_(clocks) {}

  void init(uint32_t address, int count, const Where& where);
  void arrive(uint32_t address, int64_t expected_bytes, const Where& where);
  bool test(uint32_t address, uint32_t parity, const Where& where);
  void wait(uint32_t address, uint32_t parity, const Where& where);
  // A bulk copy that will count its bytes there; and has landed them: the stamp by which others learn of it.
  void begin_load(uint32_t address, uint32_t bytes, const Where& where);
  Stamp land(uint32_t address, uint32_t bytes, const Where& where);

  std::string describe() const;
  void check_end() const;

 private:
  struct Mbarrier {
    int count = 0, pending = 0;
    int64_t expected = 0;   // bytes of this phase: expected less landed
    int64_t in_flight = 0;  // bytes of copies under way
    int phase = 0;
    bool unwaited = false;  // a phase with bytes has ended that nobody has waited for
    bool with_bytes = false;
    int agent = kNoAgent;
    Time landed = 0;
    Stamp init;
    Clock arrived, ended;  // what arrivals of this phase, and of ended ones, knew
  };
  Mbarrier& find(uint32_t address, const char* instruction, const Where& where);
  void end_phase_if_complete(uint32_t address, Mbarrier& mbarrier);
  std::string describe(uint32_t address, const Mbarrier& mbarrier) const;

  Block& block_;
  Clocks& clocks_;
  std::map<uint32_t, Mbarrier> mbarriers_;  // by address
};

}  // namespace heedful::emulator
