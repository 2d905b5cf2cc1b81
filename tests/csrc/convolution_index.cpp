// csrc/convolution_index.h for ctypes: g++ -shared -fPIC -std=c++17 -I csrc
#include "convolution_index.h"

using namespace sf;

extern "C" {

int columns_of_tile(int height, int width, int pixels) { return best_columns(height, width, pixels); }

int64_t tiles(const ConvolutionShape* shape) { return count_tiles(*shape); }

void tile(const ConvolutionShape* shape, int64_t index, Tile* found) { *found = tile_at(*shape, index); }

int steps(const ConvolutionShape* shape, const Tile* tile) { return steps_of(*shape, taps_seeing(*shape, tile->frame)); }

void step(const ConvolutionShape* shape, const Tile* tile, int index, Step* found) {
  *found = step_at(*shape, *tile, taps_seeing(*shape, tile->frame), index);
}

int64_t place(const ConvolutionShape* shape, const Tile* tile, int pixel) {  // -1: outside
  const Pixel found = pixel_of(*shape, *tile, pixel);
  return found.inside ? found.at : -1;
}
}
