// The bulk copy engine: tiles of tensors, and stretches of memory, between global and shared memory.
//
// A load takes its words of shared memory at its issue and gives them back when it lands. A store reads shared memory
// some time before wait_stores_read, and writes global memory some time before wait_stores.
#pragma once

#include <deque>
#include <map>
#include <memory>

#include "../../cuda/sm90/tensor_map.h"
#include "../block.h"
#include "clocks.h"

namespace heedful::emulator {

class BulkCopies {
 public:
  BulkCopies(Block& block, Sm90& sm90);

  using Layout = cuda::TensorLayout;
  void load_tile(uint32_t to, const Layout& layout, const int* at, int dimensions, uint32_t mbarrier,
                 const Where& where);
  void load_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t mbarrier, const Where& where);
  void store_tile(const Layout& layout, uint32_t from, const int* at, int dimensions, bool adds, const Where& where);
  void add_bulk(float* to, uint32_t from, uint32_t bytes, const Where& where);
  void commit();
  void wait(size_t groups, bool read_only);

  bool land_one();    // of the loads in flight, if there is one
  void store_some();  // whatever stores are open may go on
  void check_leaving(int thread) const;
  void finish();  // what a block leaves to be written when its threads have left

 private:
  // 16 bytes of shared memory; of a tile, the first and the last may lie out of the tensor.
  struct Chunk {
    uint32_t shared;
    char* global;                  // of the first byte
    uint32_t begin = 0, end = 16;  // within the tensor
  };
  struct Load {
    std::vector<Chunk> chunks;
    uint32_t mbarrier, bytes;
    Where where;
  };
  struct Store {
    const char* instruction;
    std::vector<Chunk> chunks;
    uint32_t element;  // bytes
    bool adds;
    Time number;  // of its thread's
    Where where;
    std::vector<unsigned char> bytes;  // as soon as they are read
    bool written = false;
  };
  using Stores = std::vector<std::shared_ptr<Store>>;
  struct OfThread {
    int reads = kNoAgent, writes = kNoAgent;  // agents: of shared memory, to global memory
    Time issued = 0;
    Stores open;  // that no commit has closed
    std::deque<Stores> groups;
    size_t groups_read = 0;  // the first ones
  };

  std::vector<Chunk> chunks_of(const Layout& layout, const int* at, int dimensions, uint32_t shared,
                               const char* instruction, const Where& where) const;
  void begin(Load load, uint32_t to, const char* instruction);
  void begin(Store store);
  void land(Load& load);
  void read(Store& store);
  void write(Store& store);
  void claim(const Store& store, const Stamp& written, const Clock& known);

  Block& block_;
  Sm90& sm90_;
  std::vector<Load> loads_;
  std::vector<OfThread> threads_;
  struct Claim {
    const char *end, *instruction;
    Stamp stamp;
  };
  std::map<const char*, Claim> claims_;  // bytes of global memory, by their begin
};

}  // namespace heedful::emulator
