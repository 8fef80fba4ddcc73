// mma.sync and ldmatrix. Fragments: PTX ISA 9.7.14.5.
//
// Register m of a fragment, taken over the 32 lanes as 64 numbers of 16 bits, is an 8 x 8 matrix row
// by row: lane l holds numbers 2 (l % 4) and the next of row l / 4. For A the rows are A's (the
// quarters of a 16 x 16 tile column by column), for B its columns.
#include "block.h"
#include "values.h"

namespace ptxsim {

using Matrix = float[8][8];

static void expand(const Words& from, bool bf16, Matrix& to) {
  for (size_t l = 0; l < kWarp; ++l) {
    const auto low = static_cast<uint16_t>(from[l]), high = static_cast<uint16_t>(from[l] >> 16);
    float* pair = &to[l / 4][l % 4 * 2];
    pair[0] = bf16 ? from_bf16(low) : from_f16(low);
    pair[1] = bf16 ? from_bf16(high) : from_f16(high);
  }
}

static double toward_zero(double x) {  // to a float
  const float near = static_cast<float>(x);
  if (std::abs(static_cast<double>(near)) <= std::abs(x)) return near;
  return std::nextafter(near, 0.0f);
}

// D = A B + C with sums in double, where the products are exact.
void Block::multiply_add(Warp& w, const Instruction& i) {
  const size_t steps = i.depth / 8;  // 8 x 8 matrices along k
  double b[16][8], sums[8];
  Words result[4];  // written at the end: registers may be those of A
  for (size_t step = 0; step < steps; ++step) {
    Matrix columns;
    expand(w.regs32[i.in[2 * steps + step].index], i.bf16, columns);
    for (size_t k = 0; k < 8; ++k) {
      for (size_t n = 0; n < 8; ++n) b[step * 8 + k][n] = static_cast<double>(columns[n][k]);
    }
  }
  for (size_t half = 0; half < 2; ++half) {
    Matrix a[2];
    for (size_t step = 0; step < steps; ++step) {
      expand(w.regs32[i.in[step * 2 + half].index], i.bf16, a[step]);
    }
    Words scratch[2];
    const uint32_t* c[2];
    for (size_t n = 0; n < 2; ++n) c[n] = view32(w, i.in[3 * steps + half * 2 + n], scratch[n]);
    for (size_t row = 0; row < 8; ++row) {
      for (size_t n = 0; n < 8; ++n) sums[n] = bits<float>(c[n % 2][row * 4 + n / 2]);
      for (size_t step = 0; step < steps; ++step) {
        for (size_t k = 0; k < 8; ++k) {
          const auto x = static_cast<double>(a[step][row][k]);
          for (size_t n = 0; n < 8; ++n) sums[n] += x * b[step * 8 + k][n];
        }
        if (!options_.truncate) continue;
        for (double& sum : sums) sum = toward_zero(sum);
      }
      for (size_t n = 0; n < 8; ++n) {
        result[half * 2 + n % 2][row * 4 + n / 2] = f32(static_cast<float>(sums[n]));
      }
    }
  }
  for (size_t n = 0; n < 4; ++n) {
    if (i.to[n].kind == Operand::kReg32) w.regs32[i.to[n].index] = result[n];
  }
}

// Thread t points at row t % 8 of matrix t / 8. With .trans the lane's numbers come from column
// l / 4. A read counts for the lane that gets the number.
void Block::load_matrices(Warp& w, const Instruction& i, int pc) {
  static const auto kReaders = [] {  // lanes by transposed, row, column
    std::array<std::array<std::array<uint32_t, kRow>, kRow>, 2> lanes{};
    for (uint32_t row = 0; row < kRow; ++row) {
      for (uint32_t column = 0; column < kRow; ++column) {
        lanes[0][row][column] = 1u << (row * 4 + column / 2);
        lanes[1][row][column] = 1u << (column * 4 + row / 2);
      }
    }
    return lanes;
  }();
  Lanes address;
  fetch_address(w, i.in[0], address);
  Count& count = result_.counts[static_cast<size_t>(pc)];
  uint64_t ideal;
  const uint32_t readers = i.vector == 4 ? kAllLanes : (1u << i.vector * 8) - 1;
  count.wavefronts += wavefronts(address, readers, 16, ideal);
  count.ideal += ideal;
  uint16_t matrices[4][8][8];
  for (uint32_t m = 0; m < i.vector; ++m) {
    for (uint32_t row = 0; row < 8; ++row) {
      const auto at = static_cast<uint32_t>(address[m * 8 + row] & (kSharedWindow - 1));
      const int lane = static_cast<int>(m * 8 + row);
      std::memset(matrices[m][row], 0xA5, 16);
      if (!in_shared(w, lane, at, 16, pc, false)) continue;
      std::memcpy(matrices[m][row], shared_.data() + (at - kSharedBase), 16);
      if (options_.check) {
        read_row(w, (at - kSharedBase) / 2, kReaders[i.transposed][row].data(), pc);
      }
    }
  }
  for (size_t m = 0; m < i.vector; ++m) {
    Lanes value;
    for (size_t l = 0; l < kWarp; ++l) {
      const size_t major = l / 4, minor = l % 4 * 2;
      const uint16_t low = i.transposed ? matrices[m][minor][major] : matrices[m][major][minor];
      const uint16_t high = i.transposed ? matrices[m][minor + 1][major]
                                         : matrices[m][major][minor + 1];
      value[l] = uint32_t{low} | uint32_t{high} << 16;
    }
    store(w, i.to[m], value, kAllLanes);
  }
}

}  // namespace ptxsim
