#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pliant {
namespace {

constexpr auto kSpin = std::chrono::microseconds(40);  // how long a worker waits for the next job before it sleeps

constexpr uint64_t kNone = 0xffffffff;  // a chunk that no job has

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int threads, int64_t chunks, void (*work)(void*, int64_t), void* argument) {
    if (threads <= 1 || chunks <= 1 || busy_.test_and_set(std::memory_order_acquire)) {
      for (int64_t i = 0; i < chunks; ++i) work(argument, i);
      return;
    }
    for (auto place = static_cast<int>(workers_.size()); place + 1 < threads; ++place) {
      workers_.emplace_back([this, place] { serve(place); });
    }
    const auto job = static_cast<uint32_t>((next_ >> 32) + 1);
    next_ = uint64_t{job} << 32 | kNone;  // first, so that no thread of the last job claims a chunk of this one
    work_ = work;
    argument_ = argument;
    chunks_ = static_cast<uint32_t>(chunks);
    helpers_ = threads - 1;
    done_ = 0;
    next_ = uint64_t{job} << 32;
    job_ = job;
    if (asleep_ > 0) {
      {
        const std::lock_guard lock(sleep_);
      }
      wake_.notify_all();
    }
    while (take(job)) {
    }
    for (int tries = 0; done_.load(std::memory_order_acquire) != chunks_; ++tries) {  // until the others are done
      tries < 4096 ? relax() : std::this_thread::yield();
    }
    busy_.clear(std::memory_order_release);
  }

 private:
  // Does the next chunk of a job. One word holds the number of the job above that of the chunk, so that a late thread
  // cannot claim a chunk of a later job; and the job does not change until the chunk is done.
  bool take(uint32_t job) {
    uint64_t next = next_.load(std::memory_order_acquire);
    do {
      if (next >> 32 != job || static_cast<uint32_t>(next) >= chunks_) return false;
    } while (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel, std::memory_order_acquire));
    work_.load()(argument_, static_cast<uint32_t>(next));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  [[noreturn]] void serve(int place) {
    for (uint32_t seen = 0;;) {
      seen = wait(seen);
      while (place < helpers_ && take(seen)) {
      }
    }
  }

  // The number of the job that came after the one seen.
  uint32_t wait(uint32_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (const uint32_t job = job_.load(std::memory_order_acquire); job != seen) return job;
        relax();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock lock(sleep_);
    ++asleep_;
    wake_.wait(lock, [&] { return job_ != seen; });
    --asleep_;
    return job_;
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::vector<std::thread> workers_;
  std::atomic<void (*)(void*, int64_t)> work_{nullptr};
  std::atomic<void*> argument_{nullptr};
  std::atomic<uint32_t> chunks_{0};
  std::atomic<int> helpers_{0};
  alignas(64) std::atomic<uint64_t> next_{0};  // the job, then its next chunk
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<uint32_t> job_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<int> asleep_{0};
};

Pool* pool = nullptr;  // never deleted: a process may end while its threads sleep

}  // namespace

void parallel(int threads, int64_t chunks, void (*work)(void*, int64_t), void* argument) {
  static std::once_flag made;
  std::call_once(made, [] {
    pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // a child process has none of the threads
#endif
  });
  pool->run(threads, chunks, work, argument);
}

}  // namespace pliant
