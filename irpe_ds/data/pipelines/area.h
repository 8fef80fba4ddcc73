// Reduces an image by area, one row after the other, with the pixels of OpenCV's INTER_AREA: the
// same weights, and the same products and sums of floats in the same order.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace area {

using Four = float __attribute__((vector_size(16)));

struct Tap {
  int64_t target, source;
  float weight;
};

// What is reduced along a side: `length` of `pixels`, from `begin`, both in pixels or parts of them.
struct Side {
  int64_t pixels;
  double begin, length;

  explicit Side(int64_t all) : Side(all, 0, static_cast<double>(all)) {}
  Side(int64_t pixels, double begin, double length)
      : pixels(pixels), begin(begin), length(length) {}
};

// Which source pixels make which target pixels, in both's order, along a side. From OpenCV, which
// knows whole pixels only.
inline std::vector<Tap> taps(const Side& source, int64_t target) {
  const double scale = 1.0 / (target / source.length);
  std::vector<Tap> made;
  for (int64_t n = 0; n < target; ++n) {
    const double begin = source.begin + n * scale, end = begin + scale;
    const double width = std::min(scale, source.pixels - begin);
    const int64_t last = std::min<int64_t>(std::floor(end), source.pixels - 1);
    const int64_t first = std::min<int64_t>(std::ceil(begin), last);
    if (first - begin > 1e-3) made.push_back({n, first - 1, float((first - begin) / width)});
    for (int64_t m = first; m < last; ++m) made.push_back({n, m, float(1.0 / width)});
    if (end - last > 1e-3) {
      made.push_back({n, last, float(std::min(std::min(end - last, 1.0), width) / width)});
    }
  }
  return made;
}

inline bool is_whole(int64_t source, int64_t target) {
  const double scale = 1.0 / (static_cast<double>(target) / source);
  return std::abs(scale - std::rint(scale)) < 2.220446049250313e-16;
}

// Whether OpenCV takes these weights: not where a side grows, or both shrink by a whole number.
inline bool applies(int64_t height, int64_t width, int64_t target_height, int64_t target_width) {
  if (height < target_height || width < target_width) return false;
  return !(is_whole(height, target_height) && is_whole(width, target_width));
}

inline void as_floats(const uint8_t* __restrict pixels, float* __restrict to, int64_t values) {
  for (int64_t n = 0; n < values; ++n) to[n] = pixels[n];
}

template <int64_t fixed>
inline void reduce(const float* source, const int64_t* first, const Four* weights, int64_t places,
                   int64_t count, float* to) {
  if (fixed) count = fixed;  // known to the compiler
  for (int64_t place = 0; place < places; ++place, weights += count, to += 3) {
    const float* from = source + first[place];
    Four sum = {};
    for (int64_t n = 0; n < count; ++n) {
      Four pixel;  // and the next one's red
      std::memcpy(&pixel, from + 3 * n, sizeof pixel);
      sum += pixel * weights[n];
    }
    std::memcpy(to, &sum, sizeof sum);
  }
}

// A row, reduced in width: `count` weights of each place.
inline void reduce_row(const float* source, const int64_t* first, const Four* weights,
                       int64_t places, int64_t count, float* to) {
  switch (count) {
    case 2: return reduce<2>(source, first, weights, places, count, to);
    case 3: return reduce<3>(source, first, weights, places, count, to);
    case 4: return reduce<4>(source, first, weights, places, count, to);
    default: return reduce<0>(source, first, weights, places, count, to);
  }
}

inline void start(float weight, const float* __restrict row, int64_t values,
                  float* __restrict sums) {
  for (int64_t n = 0; n < values; ++n) sums[n] = weight * row[n];
}

inline void add_to(float weight, const float* __restrict row, int64_t values,
                   float* __restrict sums) {
  for (int64_t n = 0; n < values; ++n) sums[n] += weight * row[n];
}

// To the nearest, half to even: of 1.5 * 2^23 and a number up to 255, the last bits are that.
inline void rounded(const float* __restrict sums, int64_t values, uint8_t* __restrict to) {
  for (int64_t n = 0; n < values; ++n) {
    const float sum = sums[n] + 12582912.0f;
    uint32_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    to[n] = static_cast<uint8_t>(bits);
  }
}

// Takes the rows of an image of height x width RGB pixels; writes them reduced, mirrored if asked.
class Resizer {
 public:
  Resizer(const Side& height, const Side& width, uint8_t* target, int64_t target_height,
          int64_t target_width, bool is_mirrored)
      : width_(width.pixels), rows_(taps(height, target_height)), target_(target) {
    const std::vector<Tap> columns = taps(width, target_width);
    std::vector<int64_t> counts(target_width);
    for (const Tap& tap : columns) ++counts[tap.target];
    count_ = *std::max_element(counts.begin(), counts.end());
    first_.resize(target_width);
    weights_.resize(target_width * count_);  // unused ones are 0, which adds nothing
    for (size_t n = 0; n < columns.size();) {
      const int64_t column = columns[n].target;
      const int64_t place = is_mirrored ? target_width - 1 - column : column;
      first_[place] = 3 * columns[n].source;
      for (int64_t m = 0; m < counts[column]; ++m, ++n) {
        const float weight = columns[n].weight;
        weights_[place * count_ + m] = Four{weight, weight, weight, weight};
      }
    }
    source_.resize(3 * (width_ + count_) + 1);
    reduced_.resize(3 * target_width + 1);
    sums_.resize(3 * target_width);
  }

  // The next row, from the top.
  void add(const uint8_t* pixels) {
    const int64_t row = row_++;
    if (next_ == rows_.size() || rows_[next_].source != row) return;
    as_floats(pixels, source_.data(), 3 * width_);
    reduce_row(source_.data(), first_.data(), weights_.data(), first_.size(), count_,
               reduced_.data());
    for (; next_ < rows_.size() && rows_[next_].source == row; ++next_) accumulate(next_);
  }

 private:
  void accumulate(size_t place) {
    const Tap& tap = rows_[place];
    const int64_t values = static_cast<int64_t>(sums_.size());
    const bool begins = place == 0 || rows_[place - 1].target != tap.target;
    (begins ? start : add_to)(tap.weight, reduced_.data(), values, sums_.data());
    const bool ends = place + 1 == rows_.size() || rows_[place + 1].target != tap.target;
    if (ends) rounded(sums_.data(), values, target_ + tap.target * values);
  }

  int64_t width_, count_ = 0, row_ = 0;
  std::vector<Tap> rows_;
  size_t next_ = 0;
  uint8_t* target_;
  std::vector<int64_t> first_;
  std::vector<Four> weights_;
  std::vector<float> source_, reduced_, sums_;
};

}  // namespace area
