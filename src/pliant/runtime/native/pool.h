// Threads that share one job at a time.
#pragma once

#include <cstdint>

namespace pliant {

// Calls work(argument, i) for every i below `chunks`, on the calling thread and on up to `threads` - 1 others. Chunks
// are claimed one by one, so a thread without a processor delays only the chunk it has claimed. During another call,
// from this thread or any other, the caller does everything.
void parallel(int threads, int64_t chunks, void (*work)(void* argument, int64_t chunk), void* argument);

template <class Work>
void parallel(int threads, int64_t chunks, Work&& work) {
  parallel(threads, chunks, [](void* argument, int64_t chunk) { (*static_cast<Work*>(argument))(chunk); }, &work);
}

}  // namespace pliant
