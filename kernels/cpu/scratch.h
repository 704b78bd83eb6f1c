// Working memory of a thread, kept from one task to the next.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace uniad {

// Hands out aligned pieces and takes them all back when it is destroyed; the blocks themselves stay with the thread. One
// made while another is there gets other blocks: what starts threads works in one of them itself.
class Scratch {
 public:
  Scratch() : first_(this_thread().used) {}
  ~Scratch() { this_thread().used = first_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Uninitialised.
  template <class T> T* take(int64_t count) {
    const size_t bytes = (size_t)(count * (int64_t)sizeof(T) + 63) / 64 * 64 + 64;
    Blocks& mine = this_thread();
    if (mine.used == mine.blocks.size()) mine.blocks.push_back({nullptr, 0});
    Block& block = mine.blocks[mine.used++];
    if (block.bytes < bytes) {
      std::free(block.data);
      block.data = std::aligned_alloc(64, bytes);
      block.bytes = block.data ? bytes : 0;
      if (!block.data) throw std::bad_alloc();
    }
    return (T*)block.data;
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  struct Blocks {
    std::vector<Block> blocks;
    size_t used = 0;
    ~Blocks() {
      for (Block& block : blocks) std::free(block.data);
    }
  };
  static Blocks& this_thread() {
    static thread_local Blocks blocks;
    return blocks;
  }
  size_t first_;
};

}  // namespace uniad
