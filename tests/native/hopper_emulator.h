// A Hopper card for the CPU: everything of csrc/cuda/hopper_ptx.h, hopper_wgmma.h and hopper_host.h that the kernels
// use, so that the very kernel sources run here, thread by thread.
//
// Every CUDA thread is a fiber; a block's fibers take turns at the points where they can wait for one another. What the
// card does behind a program's back (copies of the copy engine, wgmma) is done here at a time of the caller's choosing:
// at once, as late as can be, or at random. So a stage read before it is full, overwritten while it is read, or sums
// looked at too early give wrong results, and a wait for something that never comes is reported as a deadlock.
//
// Descriptors and tensor maps are taken apart as the PTX ISA and the driver's documentation say, apart from the code
// under test. Rounding is not the card's: tests that compare bits use numbers whose sums are exact.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/sweep_layout.h"

#define GSSF_DEVICE inline
#define GSSF_KERNEL(threads) inline void
#define GSSF_GRID const

namespace gssf::chip {

using hopper::Number;
using Barrier = uint64_t;

// A matrix in memory, and how many rows (by 64 channels) one copy takes of it.
struct TensorMap {
  const uint8_t* data;
  int64_t rows, channels, row_bytes;
  int box_rows;
};

enum When { at_once, late, at_random };

struct Settings {
  int processors = 3;
  When copies = at_once, products = at_once;
  uint32_t seed = 0;  // of the order of fibers; 0: as they come
};

inline Settings settings;

struct Mbarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
};

struct Meeting {  // of a warp's lanes, or of the threads at a named barrier
  int here = 0, expected = 0;
  uint64_t count = 0;
  bool flag = false, flags[2] = {};
  uint64_t values[2][32] = {};
};

struct Copy {
  uint32_t to;
  TensorMap map;
  int row, channel;
  Barrier* barrier;
};

struct Multiplication {
  uint64_t a, b;
  bool add;
  Number number;
  int columns, offset, joined = 0;
  std::vector<float*> scores = std::vector<float*>(hopper::kWarpgroup);
};

struct Warpgroup {
  std::deque<Multiplication> queue;  // issued by some or all threads, in order
  int64_t over = 0;                  // products done so far; queue[0] is number `over`
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // where it waits
  std::unique_ptr<char[]> stack;
  bool started = false, over = false, fenced = false;
  std::function<bool()> ready = [] { return true; };
  const char* waits_for = "its start";
  int64_t issued = 0;             // products
  std::vector<int64_t> groups;    // products issued when each group was committed
  std::vector<float> sums;        // of the products in flight
  std::map<int, int64_t> flying;  // offset: the last product issued for it
};

constexpr uint32_t kBase = 4096;  // address of the block's shared memory
constexpr int kSharedBytes = 227 * 1024, kStack = 64 * 1024;

class Block {
 public:
  Block(int index, int blocks, int threads, int shared, std::function<void()> kernel)
      : index_(index),
        blocks_(blocks),
        shared_(shared),
        kernel_(std::move(kernel)),
        random_(settings.seed * 2654435761u + 1) {
    fibers_.resize(threads), warps_.resize((threads + 31) / 32), groups_.resize(threads / hopper::kWarpgroup);
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(4096, 256 * 1024));
    std::memset(memory_, 0xFF, 256 * 1024);  // NaN in every format
  }
  ~Block() { std::free(memory_); }

  void run() {
    now = this;
    for (auto& fiber : fibers_) {
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, &Block::begin, 0);
    }
    while (step()) {
    }
    now = nullptr;
    if (!error_.empty()) throw std::runtime_error("emulated block " + std::to_string(index_) + ": " + error_);
  }

  static inline Block* now = nullptr;

  int index_, blocks_, shared_, running_ = 0;

  void check(bool right, const char* what) {
    if (right) return;
    error_ = what;
    Fiber& fiber = self();
    fiber.over = true;
    leave(fiber);
  }

  void wait_until(const char* what, std::function<bool()> ready) {
    Fiber& fiber = self();
    fiber.waits_for = what, fiber.ready = std::move(ready);
    leave(fiber);
  }

  // Waits for `count` threads. Returns the number of the meeting.
  uint64_t meet(Meeting& meeting, int count, bool flag, const char* what) {
    check(meeting.here == 0 || meeting.expected == count, "a barrier's threads disagree on how many they are");
    const uint64_t mine = meeting.count;
    meeting.expected = count, meeting.flag |= flag;
    if (++meeting.here == count) {
      meeting.flags[mine % 2] = meeting.flag;
      meeting.here = 0, meeting.flag = false, ++meeting.count;
    }
    wait_until(what, [&meeting, mine] { return meeting.count > mine; });
    return mine;
  }

  uint64_t exchange(uint64_t value, int lanes) {
    Meeting& warp = warps_[running_ / 32];
    warp.values[warp.count % 2][running_ % 32] = value;
    const int size = std::min<int>(32, fibers_.size() - running_ / 32 * 32);
    const uint64_t mine = meet(warp, size, false, "a shuffle");
    return warp.values[mine % 2][(running_ % 32) ^ lanes];
  }

  Meeting& barrier(int number) { return named_[number]; }

  uint32_t address(const void* pointer) {
    const auto offset = static_cast<const uint8_t*>(pointer) - memory_;
    check(offset >= 0 && offset < kSharedBytes, "an address outside shared memory");
    return kBase + static_cast<uint32_t>(offset);
  }
  uint8_t* memory() { return memory_; }
  uint8_t* at(uint32_t address) { return memory_ + (address - kBase); }

  Mbarrier& mbarrier(Barrier* barrier) {
    const auto found = mbarriers_.find(barrier);
    if (found == mbarriers_.end()) check(false, "an mbarrier that was not initialised");
    return found->second;
  }
  void init(Barrier* barrier, int arrivals) { mbarriers_[barrier] = {arrivals, arrivals, 0, 0}; }
  void arrive(Barrier* at, int64_t bytes) {
    Mbarrier& barrier = mbarrier(at);
    check(barrier.pending > 0, "more arrivals at an mbarrier than it expects");
    barrier.bytes += bytes, --barrier.pending;
    turn_over(barrier);
  }
  static void turn_over(Mbarrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.arrivals, ++barrier.phase;
  }

  void copy(const Copy& copy) {
    check(copy.to % 1024 == 0, "a stage that does not start on 1024 bytes");
    copies_.push_back(copy);
    while (settings.copies == at_once && !copies_.empty()) perform_copy(0);
  }

  void multiply(float* scores, Multiplication product) {
    Fiber& fiber = self();
    Warpgroup& group = groups_[running_ / hopper::kWarpgroup];
    check(fiber.fenced, "wgmma without a fence since its registers were used");
    const int64_t place = fiber.issued++ - group.over;
    check(place >= 0, "a product of a warpgroup that is over before all its threads issued it");
    if (place == int64_t(group.queue.size())) group.queue.push_back(product);
    Multiplication& shared = group.queue[place];
    check(shared.a == product.a && shared.b == product.b && shared.add == product.add &&
              shared.columns == product.columns && shared.offset == product.offset,
          "threads of a warpgroup issue different products");
    fiber.sums.resize(hopper::kScores);
    if (!fiber.flying.count(product.offset))  // the registers are the hardware's now, and read as NaN
      for (int k = product.offset; k < product.offset + product.columns / 2; ++k)
        fiber.sums[k] = scores[k], scores[k] = std::numeric_limits<float>::quiet_NaN();
    fiber.flying[product.offset] = fiber.issued;
    shared.scores[running_ % hopper::kWarpgroup] = scores;
    ++shared.joined;
    while (settings.products == at_once && perform_product(group)) {
    }
  }

  void wait_for_groups(int open) {
    Fiber& fiber = self();
    Warpgroup& group = groups_[running_ / hopper::kWarpgroup];
    const int64_t closed = int64_t(fiber.groups.size()) - open;
    const int64_t needed = closed > 0 ? fiber.groups[closed - 1] : 0;
    wait_until("its products", [&group, needed] { return group.over >= needed; });
    if (open == 0) check(fiber.issued == needed, "products that were never committed"), fiber.fenced = false;
  }

  Fiber& self() { return fibers_[running_]; }
  int threads() const { return static_cast<int>(fibers_.size()); }

 private:
  static void begin() {
    now->kernel_();
    Fiber& fiber = now->self();
    fiber.over = true;
    now->leave(fiber);
  }

  // A fiber's first turn is by setcontext, all others by a jump: ucontext asks the kernel for the signal mask each
  // time.
  void enter(Fiber& fiber) {
    if (_setjmp(home_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  void leave(Fiber& fiber) {
    if (_setjmp(fiber.place) == 0) _longjmp(home_, 1);
  }

  uint32_t random() { return random_ ^= random_ << 13, random_ ^= random_ >> 17, random_ ^= random_ << 5; }

  // One fiber's turn, or one thing behind their backs. False when all is over.
  bool step() {
    if (!error_.empty()) return false;
    if (settings.copies == at_random && !copies_.empty() && random() % 64 == 0) perform_copy(random() % copies_.size());
    if (settings.products == at_random && !groups_.empty() && random() % 64 == 0)
      perform_product(groups_[random() % groups_.size()]);
    const int count = fibers_.size(), start = settings.seed ? random() % count : running_;
    bool all_over = true;
    for (int k = 0; k < count; ++k) {
      const int next = (start + k) % count;
      if (fibers_[next].over) continue;
      all_over = false;
      if (!fibers_[next].ready()) continue;
      running_ = next;
      fibers_[next].ready = [] { return true; };
      enter(fibers_[next]);
      return true;
    }
    if (all_over) {
      if (!copies_.empty()) error_ = "copies under way at the end";
      for (const auto& [_, barrier] : mbarriers_)
        if (barrier.bytes) error_ = "an mbarrier still expects bytes at the end";
      return false;
    }
    if (!copies_.empty()) {
      perform_copy(random() % copies_.size());
      return true;
    }
    for (auto& group : groups_)
      if (perform_product(group)) return true;
    std::map<std::string, int> waiting;
    for (const auto& fiber : fibers_)
      if (!fiber.over) ++waiting[fiber.waits_for];
    error_ = "deadlock;";
    for (const auto& [what, threads] : waiting)
      error_ += " " + std::to_string(threads) + " threads wait for " + what + ";";
    return false;
  }

  static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }  // 128 bytes

  void perform_copy(size_t which) {
    const Copy copy = copies_[which];
    copies_.erase(copies_.begin() + which);
    for (int r = 0; r < copy.map.box_rows; ++r)
      for (int c = 0; c < 64; ++c) {
        uint16_t value = 0;
        const int64_t row = copy.row + r, channel = copy.channel + c;
        if (row < copy.map.rows && channel < copy.map.channels)
          std::memcpy(&value, copy.map.data + row * copy.map.row_bytes + channel * 2, 2);
        std::memcpy(at(swizzled(copy.to + r * 128 + c * 2)), &value, 2);
      }
    Mbarrier& barrier = mbarrier(copy.barrier);
    barrier.bytes -= copy.map.box_rows * 128;
    turn_over(barrier);
  }

  static float value(Number number, uint16_t bits) {
    float x;
    if (number == Number::bf16) {
      const uint32_t wide = uint32_t(bits) << 16;
      std::memcpy(&x, &wide, 4);
      return x;
    }
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return half;
  }

  // Row r, channel k of the operand that a descriptor names.
  float element(uint64_t descriptor, Number number, int r, int k) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, distance = (descriptor >> 32 & 0x3FFF) << 4;
    uint16_t bits;
    std::memcpy(&bits, at(swizzled(start + r / 8 * distance + r % 8 * 128 + k * 2)), 2);
    return value(number, bits);
  }

  bool perform_product(Warpgroup& group) {
    if (group.queue.empty() || group.queue[0].joined < hopper::kWarpgroup) return false;
    const Multiplication product = group.queue[0];
    for (uint64_t descriptor : {product.a, product.b})
      if (descriptor >> 62 != 1 || (descriptor >> 46 & 0xFFFF) != 0 || (descriptor & 0xC000C000) != 0)
        error_ = "a descriptor that is not swizzled by 128 bytes, or has reserved bits set";
    std::vector<float> a(64 * 16), b(16 * product.columns);  // b by channel
    for (int r = 0; r < 64; ++r)
      for (int k = 0; k < 16; ++k) a[r * 16 + k] = element(product.a, product.number, r, k);
    for (int c = 0; c < product.columns; ++c)
      for (int k = 0; k < 16; ++k) b[k * product.columns + c] = element(product.b, product.number, c, k);
    std::vector<float> sum(64 * product.columns);
    for (int r = 0; r < 64; ++r)
      for (int k = 0; k < 16; ++k) {
        float* __restrict into = &sum[r * product.columns];  // a loop of vectors
        const float *from = &b[k * product.columns], factor = a[r * 16 + k];
        for (int c = 0, columns = product.columns; c < columns; ++c) into[c] += factor * from[c];
      }
    ++group.over;
    const int first = (&group - groups_.data()) * hopper::kWarpgroup;
    for (int t = 0; t < hopper::kWarpgroup; ++t) {
      Fiber& fiber = fibers_[first + t];
      for (int r = 0; r < product.columns / 2; ++r) {  // PTX ISA: register fragments of m64nNk16, matrix D
        const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (r / 2 % 2), column = 8 * (r / 4) + 2 * (t % 4) + r % 2;
        float& into = fiber.sums[product.offset + r];
        into = (product.add ? into : 0.0f) + sum[row * product.columns + column];
      }
      if (fiber.flying[product.offset] == group.over) {
        std::copy_n(&fiber.sums[product.offset], product.columns / 2, product.scores[t] + product.offset);
        fiber.flying.erase(product.offset);
      }
    }
    group.queue.pop_front();
    return true;
  }

  std::function<void()> kernel_;
  std::vector<Fiber> fibers_;
  std::vector<Meeting> warps_;
  std::vector<Warpgroup> groups_;
  std::map<int, Meeting> named_;
  std::map<Barrier*, Mbarrier> mbarriers_;
  std::vector<Copy> copies_;
  uint8_t* memory_;
  jmp_buf home_;
  std::string error_;
  uint32_t random_;
};

// What the kernels call.

inline int thread() { return Block::now->running_; }
inline int block() { return Block::now->index_; }
inline int blocks() { return Block::now->blocks_; }
inline uint32_t address(const void* shared) { return Block::now->address(shared); }

template <class S>
S& shared_memory() {
  Block::now->check(int(sizeof(S)) + 1024 <= Block::now->shared_, "less shared memory than is used");
  return *reinterpret_cast<S*>(Block::now->memory());
}

inline float larger(float x, float y) {
  return x != x || y != y ? std::numeric_limits<float>::quiet_NaN() : std::max(x, y);
}

inline float exponential(float x) { return std::exp(x); }
inline void scale(float& score, float factor) { score *= factor; }
inline float logarithm(float x) { return std::log(x); }

template <class T>
T shuffle_xor(T value, int lanes) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = Block::now->exchange(bits, lanes);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void lower(int* shared, int value) { *shared = std::min(*shared, value); }
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

inline void sync_block() { Block::now->meet(Block::now->barrier(0), Block::now->threads(), false, "the block"); }
inline void sync(int barrier, int threads) {
  Block::now->meet(Block::now->barrier(barrier), threads, false, "its team");
}
inline bool sync_any(int barrier, int threads, bool flag) {
  Meeting& meeting = Block::now->barrier(barrier);
  return meeting.flags[Block::now->meet(meeting, threads, flag, "its team") % 2];
}

inline void init(Barrier* barrier, int arrivals) { Block::now->init(barrier, arrivals); }
inline void publish_barriers() {}
inline void arrive(Barrier* barrier) { Block::now->arrive(barrier, 0); }
inline void arrive_expecting(Barrier* barrier, int bytes) { Block::now->arrive(barrier, bytes); }
inline void wait(Barrier* barrier, uint32_t parity) {
  Mbarrier& found = Block::now->mbarrier(barrier);
  Block::now->wait_until("an mbarrier", [&found, parity] { return (found.phase & 1) != parity; });
}

inline void prefetch(const TensorMap&) {}
inline void load(void* shared, const TensorMap& map, int row, int channel, Barrier* barrier) {
  Block::now->copy({address(shared), map, row, channel, barrier});
}

template <int>
void keep_registers() {}
template <int>
void take_registers() {}

template <Number NUMBER, int COLUMNS, int OFFSET>
void multiply(float (&s)[hopper::kScores], uint64_t a, uint64_t b, bool add) {
  Block::now->multiply(s, {a, b, add, NUMBER, COLUMNS, OFFSET});
}
inline void begin_products() { Block::now->self().fenced = true; }
inline void commit_products() { Block::now->self().groups.push_back(Block::now->self().issued); }
inline void all_but_one_over() { Block::now->wait_for_groups(1); }
inline void finish_products(float (&)[hopper::kScores]) { Block::now->wait_for_groups(0); }

// What the launcher calls.

struct Device {
  int processors = settings.processors;
  explicit Device(const torch::stable::Tensor&) {}

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t grid, int threads, int shared, const Arguments&... arguments) {
    for (int64_t block = 0; block < grid; ++block)
      Block(block, grid, threads, shared, [&] { kernel(arguments...); }).run();
  }
};

inline TensorMap tensor_map(Number, const void* x, int64_t rows, int64_t channels, int64_t row_bytes, int box_rows) {
  if (reinterpret_cast<uintptr_t>(x) % 16 || row_bytes % 16 || box_rows > 256)
    throw std::runtime_error("a tensor map that the driver would refuse");
  return {static_cast<const uint8_t*>(x), rows, channels, row_bytes, box_rows};
}

}  // namespace gssf::chip
