// The schedule of csrc/normalization.cuh for tests/test_cuda_normalization.py: source and destinations of every pixel.
#include "normalization.cuh"

// NormActArgs' fields of sizes, in their order.
struct Sizes {
  int samples, frames, height, width, channels, cached, kept, front, left, right, top, bottom, space_pad;
};

extern "C" {

int lanes(int channels) { return sf::norm_act_lanes(channels); }
int numbers(int channels) { return sf::norm_act_elements(channels); }

// For every pixel of y and of cache_out where it comes from: n of the clip's, -1 zeros, -2 - n of the cache's. `y_written` and
// `out_written` count.
void walk(const Sizes& s, int threads, int64_t blocks, int64_t* y_from, int* y_written, int64_t* out_from, int* out_written) {
  sf::NormActArgs args{};
  args.samples = s.samples, args.frames = s.frames, args.height = s.height, args.width = s.width, args.channels = s.channels;
  args.cached = s.cached, args.kept = s.kept, args.front = s.front, args.left = s.left, args.right = s.right;
  args.top = s.top, args.bottom = s.bottom, args.space_pad = s.space_pad;
  const sf::NormActSchedule walk = sf::norm_act_schedule(args, threads);
  const sf::NormActTile stride = sf::norm_act_tile(walk, blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    sf::NormActTile at = sf::norm_act_tile(walk, block);
    for (; at.sample < walk.samples; at = sf::norm_act_advance(walk, at, stride)) {
      const int frame = at.frame + walk.first_frame;
      const sf::NormActRow row = sf::norm_act_row(args, at.sample, frame, at.row);
      for (int pixel = 0; pixel < walk.pixels; ++pixel) {
        const sf::NormActColumn column = sf::norm_act_column(args, at.run * walk.pixels + pixel);
        const int64_t n = row.from < 0 || column.from < 0 ? -1 : row.from + column.from;
        const int64_t from = n < 0 || frame >= 0 ? n : -2 - n;
        if (row.y >= 0 && column.y >= 0) y_from[row.y + column.y] = from, ++y_written[row.y + column.y];
        if (row.cache_out >= 0 && column.cache_out >= 0) {
          out_from[row.cache_out + column.cache_out] = from;
          ++out_written[row.cache_out + column.cache_out];
        }
      }
    }
  }
}

}
