#include "sm90.h"

namespace heedful::emulator {

void Sm90::pass_time(bool idle) {
  if (idle) {
    while (!block_.anyone_ready() && bulk_copies.land_one()) {
    }
  } else if (pace_ == Pace::any) {
    const uint64_t dice = block_.random() % 64;
    if (dice < 4) bulk_copies.land_one();
    if (dice == 4) bulk_copies.store_some();
    if (dice == 5) wgmma.multiply_some();
  }
}

void Sm90::check_leaving(int thread) const {
  bulk_copies.check_leaving(thread);
  wgmma.check_leaving(thread);
}

void Sm90::end() {
  bulk_copies.finish();
  mbarriers.check_end();
  named_barriers.check_end();
  registers.check_end();
}

std::string Sm90::describe() const { return mbarriers.describe() + named_barriers.describe() + registers.describe(); }

}  // namespace heedful::emulator
