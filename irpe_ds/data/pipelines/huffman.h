// Undoes the Huffman coding of a baseline JPEG in the place of libjpeg-turbo, which does the rest.
//
// Most symbols, a code with the bits that follow it, are shorter than PEEK bits: one lookup gives run,
// value and length. Where a coefficient is not wanted, one lookup skips as many symbols as fit. Between
// two restart markers that enclose nothing wanted, nothing is read but for the second marker.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <jpeglib.h>

namespace huffman {

constexpr int PEEK = 10;  // bits of a lookup
static_assert(31 + 2 * PEEK <= 56 && 2 * (PEEK + 15) <= 56);  // the symbols between two calls of fill
constexpr int END = 64;   // advance of the symbol after which a block has zeros only
constexpr int NONE = 65;  // advance where there is no symbol

constexpr uint8_t ZIGZAG[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

// A code and the bits of its value.
struct Symbol {
  int16_t value;
  uint8_t advance;  // zeros before the coefficient, and itself; or END
  uint8_t length;   // bits; OPEN if there are more than PEEK
};
constexpr uint8_t OPEN = 32;

// Symbols that are skipped together.
struct Skip {
  uint8_t advance;  // of all; END if there is none
  uint8_t length;   // bits, at most PEEK + 15; | LAST if they end a block
};
constexpr uint8_t LAST = 128;

class Table {
 public:
  Symbol symbols[1 << PEEK];
  Skip skips[1 << PEEK];

  // Does nothing if it was made of the same codes.
  void make(const JHUFF_TBL& coded) {
    if (!std::memcmp(bits_, coded.bits, sizeof bits_) &&
        !std::memcmp(values_, coded.huffval, sizeof values_)) {
      return;
    }
    std::memcpy(bits_, coded.bits, sizeof bits_);
    std::memcpy(values_, coded.huffval, sizeof values_);
    Code codes[1 << PEEK] = {};  // by the bits that come next; the long ones are left out
    int code = 0, first = 0;     // of a length
    for (int length = 1; length <= 16; ++length) {
      offset_[length] = first - code;
      for (int n = 0; n < bits_[length] && length <= PEEK; ++n) {
        const int times = 1 << (PEEK - length);
        const Code found{static_cast<uint8_t>(length), values_[first + n]};
        std::fill_n(codes + (code + n) * times, times, found);
      }
      code += bits_[length], first += bits_[length];
      end_[length] = code;
      code <<= 1;
    }
    for (uint64_t n = 0; n < 1 << PEEK; ++n) {
      const uint64_t bits = n << (64 - PEEK);
      const Symbol symbol = codes[n].length ? symbol_of(codes[n], bits) : Symbol{0, 0, OPEN};
      symbols[n] = symbol.length <= PEEK ? symbol : Symbol{0, 0, OPEN};
      skips[n] = skip(codes, bits);
    }
  }

  // The symbol at the beginning of `bits`, at least 31 of them.
  Symbol read(uint64_t bits) const {
    for (int length = 1; length <= 16; ++length) {
      const int code = static_cast<int>(bits >> (64 - length));
      if (code < end_[length]) {
        return symbol_of({static_cast<uint8_t>(length), values_[code + offset_[length]]}, bits);
      }
    }
    return {0, NONE, 0};
  }

 private:
  struct Code {
    uint8_t length;  // 0: none
    uint8_t value;   // zeros before the coefficient, and how many bits it has
  };

  uint8_t bits_[17] = {1}, values_[256] = {};  // no JPEG has one of length 0
  int end_[17];     // beyond the last code of a length
  int offset_[17];  // from a code of a length to its value

  static Symbol symbol_of(Code code, uint64_t bits) {
    const int run = code.value >> 4, size = code.value & 15;
    const uint8_t length = static_cast<uint8_t>(code.length + size);
    if (size == 0) return {0, static_cast<uint8_t>(run == 15 ? 16 : END), length};
    int32_t number = static_cast<int32_t>(bits << code.length >> (64 - size));
    if (number < 1 << (size - 1)) number -= (1 << size) - 1;
    return {static_cast<int16_t>(number), static_cast<uint8_t>(run + 1), length};
  }

  // Of the first PEEK of `bits`, those that are known.
  static Skip skip(const Code* codes, uint64_t bits) {
    int known = PEEK, advance = 0, length = 0;
    while (true) {
      const Code code = codes[bits >> (64 - PEEK)];
      if (!code.length || code.length > known) break;
      const int size = code.value & 15, symbol = code.length + size;
      if (code.value < 0xF0 && !size) {
        return {static_cast<uint8_t>(advance), static_cast<uint8_t>((length + symbol) | LAST)};
      }
      advance += (code.value >> 4) + 1, length += symbol;
      if (advance >= END) return {END, 0};
      if (symbol >= known) break;
      bits <<= symbol, known -= symbol;
    }
    return {static_cast<uint8_t>(length ? advance : END), static_cast<uint8_t>(length)};
  }
};

static thread_local Table tables[2][NUM_HUFF_TBLS];  // DC's and AC's, mostly as in the last image

// What is left of a scan, from the most significant bit on.
class Bits {
 public:
  static constexpr size_t PADDING = 512;  // bytes of zeros: beyond what a damaged block may read

  Bits(const uint8_t* begin, const uint8_t* end) : place_(begin), end_(end) {}

  void fill() {  // to at least 56
    uint64_t next;
    std::memcpy(&next, place_, 8);
    bits_ |= big_endian(next) >> count_;
    place_ += (63 - count_) >> 3, count_ |= 56;
  }
  uint64_t peek() const { return bits_; }
  void drop(int count) { bits_ <<= count, count_ -= count; }
  int64_t left() const { return 8 * (end_ - place_) + count_; }  // negative if too many were dropped

 private:
  const uint8_t *place_, *end_;
  uint64_t bits_ = 0;
  int count_ = 0;

  static uint64_t big_endian(uint64_t number) {
    return __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? number : __builtin_bswap64(number);
  }
};

// The only scan of a JPEG.
class Scan {
 public:
  // Whether a JPEG, begun to be decompressed, is one that this reads.
  static bool applies(const jpeg_decompress_struct& image) {
    return !image.progressive_mode && !image.arith_code && image.data_precision == 8 &&
           image.comps_in_scan == image.num_components &&
           image.min_DCT_scaled_size * image.scale_denom == DCTSIZE * image.scale_num;
  }

  // Of each row of units (MCUs) those from `first` to before `end` are wanted.
  Scan(jpeg_decompress_struct& image, int64_t first, int64_t end)
      : coded_(image.src->next_input_byte), coded_end_(coded_ + image.src->bytes_in_buffer),
        interval_(image.restart_interval), until_restart_(interval_),
        columns_(image.MCUs_per_row), first_(first), end_(end), num_blocks_(image.blocks_in_MCU) {
    for (int n = 0; n < num_blocks_; ++n) {
      const int number = image.MCU_membership[n];
      const jpeg_component_info& component = *image.cur_comp_info[number];
#if JPEG_LIB_VERSION >= 70
      const int size = component.DCT_h_scaled_size;
#else
      const int size = component.DCT_scaled_size;
#endif
      Table &dc = tables[0][component.dc_tbl_no], &ac = tables[1][component.ac_tbl_no];
      dc.make(*image.dc_huff_tbl_ptrs[component.dc_tbl_no]);
      ac.make(*image.ac_huff_tbl_ptrs[component.ac_tbl_no]);
      blocks_[n] = {&dc, &ac, number, size > 1};
    }
  }

  // Reads the next unit into its blocks, which are zero, or passes it; false if it is damaged.
  bool read(JBLOCKROW* blocks) {
    if (interval_ && until_restart_-- == 0 && !restart()) return false;
    const bool is_wanted = blocks && column_ >= first_ && column_ < end_;
    column_ = column_ + 1 == columns_ ? 0 : column_ + 1;
    if (!is_wanted) return ++passed_, true;
    if (!is_begun_) bits_ = unstuff(), is_begun_ = true;
    return catch_up(blocks);
  }

 private:
  struct Block {
    const Table *dc, *ac;
    int component;
    bool has_ac;  // not where only means are wanted
  };

  const uint8_t *coded_, *const coded_end_;  // what has not been copied yet
  Bits bits_{nullptr, nullptr};
  bool is_begun_ = false;  // whether `bits_` are those before the next marker
  int64_t passed_ = 0;     // units that are not wanted, and have not been skipped yet
  int64_t interval_, until_restart_, restarts_ = 0;  // in units; 0: there are none
  int64_t columns_, first_, end_, column_ = 0;
  int num_blocks_;
  uint32_t last_[MAX_COMPS_IN_SCAN] = {};  // means of the last blocks, modulo 2^32
  Block blocks_[D_MAX_BLOCKS_IN_MCU];

  // Copies what comes before the next marker, without the zero after each byte of ones.
  Bits unstuff() {
    static thread_local std::vector<uint8_t> copy;
    copy.resize(coded_end_ - coded_ + Bits::PADDING);
    uint8_t* place = copy.data();
    for (bool is_stuffed = true; is_stuffed;) {
      const uint8_t* ones = next_ones();
      is_stuffed = coded_end_ - ones > 1 && !ones[1];
      const size_t count = ones - coded_ + is_stuffed;
      std::memcpy(place, coded_, count);
      place += count, coded_ += count + is_stuffed;
    }
    std::memset(place, 0, Bits::PADDING);
    return {copy.data(), place};
  }

  const uint8_t* next_ones() const {
    const void* found = std::memchr(coded_, 0xFF, coded_end_ - coded_);
    return found ? static_cast<const uint8_t*>(found) : coded_end_;
  }

  // Skips the units that were passed, and reads one if there are blocks for it.
  bool catch_up(JBLOCKROW* blocks) {
    Bits bits = bits_;  // in registers
    for (int64_t unit = 0; unit < passed_ + (blocks != nullptr); ++unit) {
      for (int n = 0; n < num_blocks_; ++n) {
        if (!read(blocks_[n], bits, unit < passed_ ? nullptr : *blocks[n])) return false;
      }
    }
    bits_ = bits, passed_ = 0;
    return true;
  }

  // Goes on behind the next marker, which must be the right one, and come where the bits end.
  bool restart() {
    if (is_begun_ && (!catch_up(nullptr) || bits_.left() >= 8)) return false;
    while (!is_begun_) {
      coded_ = next_ones();
      if (coded_end_ - coded_ < 2 || coded_[1]) break;
      coded_ += 2;
    }
    if (coded_end_ - coded_ < 2 || coded_[1] != JPEG_RST0 + restarts_++ % 8) return false;
    coded_ += 2;
    is_begun_ = false, passed_ = 0, until_restart_ = interval_ - 1;
    std::fill(last_, last_ + MAX_COMPS_IN_SCAN, 0);
    return true;
  }

  // Reads a block, or with no place for its coefficients skips it.
  bool read(const Block& block, Bits& bits, JCOEF* coefficients) {
    bits.fill();
    const Symbol mean = next(*block.dc, bits);
    if (mean.advance == NONE) return false;
    const uint32_t value = last_[block.component] += mean.value;
    if (coefficients) coefficients[0] = static_cast<JCOEF>(value);
    const bool is_sound = coefficients && block.has_ac ? read_ac(*block.ac, bits, coefficients)
                                                       : skip_ac(*block.ac, bits);
    return is_sound && bits.left() >= 0;
  }

  static bool read_ac(const Table& table, Bits& bits, JCOEF* block) {
    for (int place = 1;;) {
      bits.fill();
      for (int n = 0; n < 3; ++n) {  // 31 + PEEK + PEEK bits at most
        const Symbol symbol = next(table, bits);
        place += symbol.advance;
        if (place > DCTSIZE2) return symbol.advance == END;
        block[ZIGZAG[place - 1]] = symbol.value;
        if (place == DCTSIZE2) return true;
      }
    }
  }

  static bool skip_ac(const Table& table, Bits& bits) {
    for (int place = 1;;) {
      bits.fill();
      Skip skip = table.skips[bits.peek() >> (64 - PEEK)];
      for (int n = 0; n < 2 && place + skip.advance < DCTSIZE2; ++n) {  // 2 * (PEEK + 15) bits
        place += skip.advance;
        bits.drop(skip.length & ~LAST);
        if (skip.length & LAST) return true;
        skip = table.skips[bits.peek() >> (64 - PEEK)];
      }
      if (place + skip.advance < DCTSIZE2) continue;
      bits.fill();
      const Symbol symbol = next(table, bits);  // those after it may be the next block's
      place += symbol.advance;
      if (place >= DCTSIZE2) return place == DCTSIZE2 || symbol.advance == END;
    }
  }

  static Symbol next(const Table& table, Bits& bits) {
    Symbol symbol = table.symbols[bits.peek() >> (64 - PEEK)];
    if (symbol.length == OPEN) [[unlikely]] {
      bits.fill();
      symbol = table.read(bits.peek());
    }
    bits.drop(symbol.length);
    return symbol;
  }
};

}  // namespace huffman
