// csrc/convolution_index.h for ctypes: g++ -shared -fPIC -std=c++17 -pthread -I csrc
#include "convolution_index.h"

#include <pthread.h>

#include <thread>

using namespace sf;

extern "C" {

int columns_of_tile(int height, int width, int pixels) { return best_columns(height, width, pixels); }

int64_t tiles(const ConvolutionShape* shape) { return count_tiles(*shape); }

void tile(const ConvolutionShape* shape, int64_t index, Tile* found) { *found = tile_at(*shape, index); }

int steps(const ConvolutionShape* shape, const Tile* tile) { return count_k_iterations(*shape, valid_taps(*shape, tile->frame)); }

void first(const ConvolutionShape* shape, const Tile* tile, KIteration* step) {
  *step = first_k_iteration(*shape, *tile, valid_taps(*shape, tile->frame));
}

void next(const ConvolutionShape* shape, const Tile* tile, KIteration* step) { next_k_iteration(*shape, *tile, step); }

int64_t place(const ConvolutionShape* shape, const Tile* tile, int pixel) {  // -1: outside
  const Pixel found = pixel_of(*shape, *tile, pixel);
  return found.in_bounds ? found.index : -1;
}

// gather_columns by four lanes at once: `numbers` (4, 8) in and out.
void gather(float* numbers) {
  pthread_barrier_t together;
  pthread_barrier_init(&together, nullptr, 4);
  float given[4];
  const auto lane_work = [&](int lane) {
    float mine[8];
    for (int i = 0; i < 8; ++i) mine[i] = numbers[8 * lane + i];
    gather_columns(mine, lane, [&](float number, int bit) {
      given[lane] = number;
      pthread_barrier_wait(&together);
      const float received = given[lane ^ bit];
      pthread_barrier_wait(&together);
      return received;
    });
    for (int i = 0; i < 8; ++i) numbers[8 * lane + i] = mine[i];
  };
  std::thread lanes[4];
  for (int lane = 0; lane < 4; ++lane) lanes[lane] = std::thread(lane_work, lane);
  for (auto& each : lanes) each.join();
  pthread_barrier_destroy(&together);
}
}
