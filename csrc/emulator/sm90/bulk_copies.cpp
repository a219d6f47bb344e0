#include "bulk_copies.h"

#include <cstring>

#include "sm90.h"

namespace heedful::emulator {

BulkCopies::BulkCopies(Block& block, Sm90& sm90) : block_(block), sm90_(sm90), threads_(size_t(block.grid().threads)) {}

std::vector<BulkCopies::Chunk> BulkCopies::chunks_of(const Layout& layout, const int* at, int dimensions,
                                                     uint32_t shared, const char* instruction,
                                                     const Where& where) const {
  const std::string what = std::string(instruction) + ", " + text(where) + ": ";
  if (const char* refusal = layout.refusal()) throw Fault(what + refusal);
  if (dimensions != layout.dimensions) throw Fault(what + "the tensor has another number of dimensions");
  if (shared % 128) throw Fault("misaligned: " + what + "shared memory at " + std::to_string(shared));
  const uint32_t bytes = layout.box_bytes(), element = bytes_of(layout.element), row_bytes = layout.box[0] * element;
  block_.shared.check_bounds(shared, 16, block_.access(where));
  block_.shared.check_bounds(shared + bytes - 16, 16, block_.access(where));
  std::vector<Chunk> chunks;
  chunks.reserve(bytes / 16);
  for (uint32_t row = 0; row < bytes / row_bytes; ++row) {
    int64_t offset = 0;
    bool inside = true;
    for (uint32_t n = 1, rest = row; n < uint32_t(dimensions); rest /= layout.box[n], ++n) {
      const int64_t index = at[n] + int64_t(rest % layout.box[n]);
      inside &= index >= 0 && index < int64_t(layout.size[n]);
      offset += index * int64_t(layout.stride[n - 1]);
    }
    for (uint32_t in_row = 0; in_row < row_bytes; in_row += 16) {
      const int64_t first = at[0] * int64_t(element) + in_row, size = int64_t(layout.size[0] * element);
      Chunk chunk{cuda::swizzled(shared + row * row_bytes + in_row, layout.swizzle),
                  static_cast<char*>(layout.data) + offset + first};
      chunk.begin = uint32_t(std::clamp<int64_t>(-first, 0, 16));
      chunk.end = inside ? uint32_t(std::clamp<int64_t>(size - first, chunk.begin, 16)) : chunk.begin;
      chunks.push_back(chunk);
    }
  }
  return chunks;
}

// ---- loads ----------------------------------------------------------------------------------------------------------

void BulkCopies::load_tile(uint32_t to, const Layout& layout, const int* at, int dimensions, uint32_t mbarrier,
                           const Where& where) {
  Load load{chunks_of(layout, at, dimensions, to, "load_tile", where), mbarrier, layout.box_bytes(), where};
  const uint32_t element = bytes_of(layout.element);
  for (const Chunk& chunk : load.chunks)
    for (uint32_t n = chunk.begin; n < chunk.end; n += element)
      machine().memory.check_read(chunk.global + n, element, where);
  begin(std::move(load), to, "load_tile");
}

void BulkCopies::load_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier, const Where& where) {
  if (!bytes || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    throw Fault("misaligned: load_bulk of " + std::to_string(bytes) + " bytes, " + text(where));
  Load load{{}, mbarrier, bytes, where};
  for (uint32_t n = 0; n < bytes; n += 16) {
    load.chunks.push_back({to + n, const_cast<char*>(static_cast<const char*>(from)) + n});
    machine().memory.check_read(load.chunks.back().global, 16, where);
    block_.shared.check_bounds(to + n, 16, block_.access(where));
  }
  begin(std::move(load), to, "load_bulk");
}

void BulkCopies::begin(Load load, uint32_t to, const char* instruction) {
  const int thread = block_.self().index;
  sm90_.mbarriers.begin_load(load.mbarrier, load.bytes, load.where);
  const AsyncAccess by{sm90_.clocks.now(thread, load.where), instruction, sm90_.clocks.of(thread)};
  constexpr unsigned char poison[16] = {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
  sm90_.words.begin_write(to, load.bytes, by);
  for (const Chunk& chunk : load.chunks) block_.shared.land(chunk.shared, poison, 16);
  if (sm90_.early()) return land(load);
  loads_.push_back(std::move(load));
}

void BulkCopies::land(Load& load) {
  for (const Chunk& chunk : load.chunks) {
    unsigned char bytes[16] = {};
    if (chunk.begin < chunk.end) std::memcpy(bytes + chunk.begin, chunk.global + chunk.begin, chunk.end - chunk.begin);
    block_.shared.land(chunk.shared, bytes, 16);
  }
  const Stamp stamp = sm90_.mbarriers.land(load.mbarrier, load.bytes, load.where);
  for (const Chunk& chunk : load.chunks) sm90_.words.end_write(chunk.shared, 16, stamp);
}

bool BulkCopies::land_one() {
  if (loads_.empty()) return false;
  const size_t n = block_.random() % loads_.size();
  Load load = std::move(loads_[n]);
  loads_.erase(loads_.begin() + std::ptrdiff_t(n));
  land(load);
  return true;
}

// ---- stores ---------------------------------------------------------------------------------------------------------

void BulkCopies::store_tile(const Layout& layout, uint32_t from, const int* at, int dimensions, bool adds,
                            const Where& where) {
  const char* instruction = adds ? "add_tile" : "store_tile";
  if (adds && layout.element != cuda::Element::f32)
    throw Fault("add_tile, " + text(where) + ": only float32 is emulated");
  begin(Store{instruction,
              chunks_of(layout, at, dimensions, from, instruction, where),
              bytes_of(layout.element),
              adds,
              0,
              where,
              {}});
}

void BulkCopies::add_bulk(float* to, uint32_t from, uint32_t bytes, const Where& where) {
  if (!bytes || bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16)
    throw Fault("misaligned: add_bulk of " + std::to_string(bytes) + " bytes, " + text(where));
  Store store{"add_bulk", {}, 4, true, 0, where, {}};
  for (uint32_t n = 0; n < bytes; n += 16) {
    store.chunks.push_back({from + n, reinterpret_cast<char*>(to) + n});
    block_.shared.check_bounds(from + n, 16, block_.access(where));
  }
  begin(std::move(store));
}

void BulkCopies::begin(Store issued) {
  const int thread = block_.self().index;
  OfThread& own = threads_[size_t(thread)];
  if (own.reads == kNoAgent) {
    own.reads = sm90_.clocks.add_agent("a bulk store of thread " + std::to_string(thread));
    own.writes = sm90_.clocks.add_agent("a bulk store of thread " + std::to_string(thread));
  }
  const auto store = std::make_shared<Store>(std::move(issued));
  store->number = ++own.issued;
  const AsyncAccess by{{own.reads, store->number, store->where}, store->instruction, sm90_.clocks.of(thread)};
  for (const Chunk& chunk : store->chunks) {
    sm90_.words.async_read(chunk.shared, 16, by);
    for (uint32_t n = chunk.begin; n < chunk.end; n += store->element)
      machine().memory.check_write(chunk.global + n, store->element, store->where);
  }
  claim(*store, {own.writes, store->number, store->where}, by.known);
  own.open.push_back(store);
  if (sm90_.early()) write(*store);
}

// NOTE: what the order of two stores to the same bytes decides must not depend on chance, sums' last bits included.
void BulkCopies::claim(const Store& store, const Stamp& written, const Clock& known) {
  for (const Chunk& chunk : store.chunks) {
    if (chunk.begin == chunk.end) continue;
    const char *begin = chunk.global + chunk.begin, *end = chunk.global + chunk.end;
    auto other = claims_.upper_bound(begin);
    if (other != claims_.begin() && std::prev(other)->second.end > begin) --other;
    while (other != claims_.end() && other->first < end) {
      if (!known.knows(other->second.stamp))
        throw Fault(std::string("unordered: ") + store.instruction + ", " + text(store.where) + ", to bytes that " +
                    other->second.instruction + ", " + text(other->second.stamp.where) + ", may be in flight to");
      other = claims_.erase(other);
    }
    claims_[begin] = {end, store.instruction, written};
  }
}

void BulkCopies::read(Store& store) {
  if (!store.bytes.empty()) return;
  for (const Chunk& chunk : store.chunks)
    store.bytes.insert(store.bytes.end(), block_.shared.at(chunk.shared), block_.shared.at(chunk.shared) + 16);
}

void BulkCopies::write(Store& store) {
  if (store.written) return;
  read(store);
  store.written = true;
  for (size_t n = 0; n < store.chunks.size(); ++n) {
    const Chunk& chunk = store.chunks[n];
    for (uint32_t b = chunk.begin; b < chunk.end; b += store.element) {
      unsigned char* from = &store.bytes[n * 16 + b];
      if (store.adds) {
        float sum, more;
        std::memcpy(&sum, chunk.global + b, 4), std::memcpy(&more, from, 4);
        sum += more;
        std::memcpy(from, &sum, 4);
      }
      std::memcpy(chunk.global + b, from, store.element);
    }
  }
}

void BulkCopies::commit() {
  OfThread& own = threads_[size_t(block_.self().index)];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

void BulkCopies::wait(size_t groups, bool read_only) {
  const int thread = block_.self().index;
  OfThread& own = threads_[size_t(thread)];
  for (size_t n = 0; n + groups < own.groups.size(); ++n)
    for (const auto& store : own.groups[n]) {
      read_only ? read(*store) : write(*store);
      sm90_.clocks.learn(thread, own.reads, store->number);
      if (!read_only) sm90_.clocks.learn(thread, own.writes, store->number);
    }
  if (own.groups.size() > groups) own.groups_read = std::max(own.groups_read, own.groups.size() - groups);
  for (; !read_only && own.groups.size() > groups; --own.groups_read) own.groups.pop_front();
}

void BulkCopies::store_some() {
  for (OfThread& thread : threads_)
    for (auto& group : thread.groups)
      for (auto& store : group) block_.coin() ? read(*store) : write(*store);
}

void BulkCopies::finish() {
  for (OfThread& thread : threads_)
    for (auto& group : thread.groups)
      for (auto& store : group) write(*store);
}

void BulkCopies::check_leaving(int thread) const {
  const OfThread& own = threads_[size_t(thread)];
  if (!own.open.empty()) throw Fault("unwaited: a thread leaves with a bulk store that was never committed");
  if (own.groups_read < own.groups.size())
    throw Fault("unwaited: a thread leaves with a bulk store that may not have read shared memory");
}

}  // namespace heedful::emulator
