// A box of a JPEG, by libjpeg-turbo: of what lies outside of it, entropy coding alone is undone, and
// below it nothing. At 1, 1/2, 1/4 or 1/8 of the size; as it is, or reduced by area on the way.
//
// Of most JPEGs huffman.h undoes the entropy coding: libjpeg-turbo calls it in the place of its own
// function, to which the second pointer of a structure leads in each of its versions.

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <vector>

#include <jpeglib.h>

#include <jerror.h>

#include "area.h"
#include "huffman.h"

namespace {

struct Errors {
  jpeg_error_mgr manager;
  jmp_buf failed;
  bool damaged;
  bool leftover;  // bytes that no pixel needed, which are mostly a sign of damage before them
  bool lost;      // huffman.h has lost its way: damaged, or it need not have been
};

Errors& errors_of(j_common_ptr image) { return *reinterpret_cast<Errors*>(image->err); }

void on_error(j_common_ptr image) { longjmp(errors_of(image).failed, 1); }

// Warnings are damage, but for those that change no pixel, as in irpe_ds/data/beton/jpeg.py: a version
// of JFIF or an Adobe transform that no one has defined, and bytes before the end of the image.
void on_message(j_common_ptr image, int level) {
  const jpeg_error_mgr& error = *image->err;
  const int code = error.msg_code;
  const bool leftover = code == JWRN_EXTRANEOUS_DATA && error.msg_parm.i[1] == JPEG_EOI;
  if (level >= 0 || code == JWRN_JFIF_MAJOR || code == JWRN_ADOBE_XFORM) return;
  (leftover ? errors_of(image).leftover : errors_of(image).damaged) = true;
}

// What is wanted of which JPEG.
struct Task {
  const uint8_t* data;
  uint64_t bytes;
  int64_t height, width;  // of the whole image, pixels
  const int64_t* box;     // top, left, height, width
  int64_t divisor;        // of the sides: 1, 2, 4 or 8
  int64_t to_end;         // whether to look below the box too, and at leftover bytes

  int64_t top() const { return box[0] / divisor; }
  int64_t left() const { return box[1] / divisor; }
  int64_t bottom() const { return std::min(ended(box[0] + box[2]), ended(height)); }
  int64_t right() const { return std::min(ended(box[1] + box[3]), ended(width)); }
  int64_t ended(int64_t place) const { return (place + divisor - 1) / divisor; }
};

// As jpegint.h of libjpeg-turbo begins it, up to 3.1; another version undoes the coding itself.
constexpr bool KNOWN = LIBJPEG_TURBO_VERSION_NUMBER < 4000000;
struct EntropyDecoder {
  void (*start_pass)(j_decompress_ptr image);
  boolean (*decode_mcu)(j_decompress_ptr image, JBLOCKROW* blocks);
};

boolean read_unit(j_decompress_ptr image, JBLOCKROW* blocks) {
  if (!static_cast<huffman::Scan*>(image->client_data)->read(blocks)) {
    errors_of((j_common_ptr)image).lost = true;
    on_error((j_common_ptr)image);
  }
  return TRUE;
}

constexpr int64_t LOST = 2;

// Decodes the box and a margin, without which upsampled colours at its edges would be other than
// in the whole image. `rows` says where a row of RGB goes, and is told when it is there: place(row,
// first column, columns), placed(row). Returns 0, or 1 if data are damaged or there is no place.
// `by_us` undoes the entropy coding here where it can, and returns LOST where damage hinders it.
template <class Rows>
int64_t decode(const Task& task, Rows& rows, bool by_us) {
  jpeg_decompress_struct image;
  Errors errors;
  image.err = jpeg_std_error(&errors.manager);
  errors.manager.error_exit = on_error;
  errors.manager.emit_message = on_message;
  errors.damaged = errors.leftover = errors.lost = false;
  if (setjmp(errors.failed)) {
    jpeg_destroy_decompress(&image);
    return errors.lost ? LOST : 1;
  }
  jpeg_create_decompress(&image);
  jpeg_mem_src(&image, task.data, task.bytes);
  jpeg_read_header(&image, TRUE);
  image.out_color_space = JCS_RGB;
  image.dct_method = JDCT_IFAST;  // as FFCV's own decoder
  image.scale_num = 1;
  image.scale_denom = static_cast<unsigned>(task.divisor);
  if (image.image_height != task.height || image.image_width != task.width) {
    on_error((j_common_ptr)&image);
  }
  jpeg_start_decompress(&image);

  const int64_t unit = image.min_DCT_scaled_size, margin = image.max_h_samp_factor;  // a colour's
  const int64_t top = std::max<int64_t>(0, task.top() - image.max_v_samp_factor * unit);
  const int64_t first = std::max<int64_t>(0, task.left() - margin);
  const int64_t last = std::min<int64_t>(task.right() + margin, image.output_width);
  JDIMENSION left = static_cast<JDIMENSION>(first), columns = static_cast<JDIMENSION>(last - first);
  jpeg_crop_scanline(&image, &left, &columns);  // to whole units
  std::optional<huffman::Scan> scan;
  if (KNOWN && by_us && huffman::Scan::applies(image)) {
    const int64_t side = image.num_components == 1 ? unit : unit * image.max_h_samp_factor;
    scan.emplace(image, left / side, (left + columns + side - 1) / side);
    image.client_data = &*scan;
    reinterpret_cast<EntropyDecoder*>(image.entropy)->decode_mcu = read_unit;
  }
  if (top > 0) jpeg_skip_scanlines(&image, static_cast<JDIMENSION>(top));

  for (int64_t row = top; row < task.bottom(); ++row) {
    JSAMPROW place = rows.place(row, left, image.output_width);
    if (!place) on_error((j_common_ptr)&image);
    jpeg_read_scanlines(&image, &place, 1);
    rows.placed(row);
  }
  if (task.to_end) {
    const JDIMENSION below = image.output_height - image.output_scanline;
    if (below > 1) jpeg_skip_scanlines(&image, below - 1);  // skipping all would read nothing
    JSAMPARRAY last_row = image.mem->alloc_sarray((j_common_ptr)&image, JPOOL_IMAGE,
                                                  3 * image.output_width, 1);
    if (below > 0) jpeg_read_scanlines(&image, last_row, 1);
    jpeg_finish_decompress(&image);
  }
  jpeg_destroy_decompress(&image);
  return errors.damaged || (task.to_end && errors.leftover);
}

// The same with the rows that `make` makes: once more if need be. Not by us where leftover bytes
// count, as we do not tell where the scan has ended.
template <class Make>
int64_t decode(const Task& task, const Make& make) {
  auto rows = make();
  const int64_t status = decode(task, rows, !task.to_end);
  if (status != LOST) return status;
  auto fresh = make();
  return decode(task, fresh, false);
}

// Rows one after the other in memory.
struct Stored {
  uint8_t* pixels;
  int64_t capacity;  // bytes
  int64_t* box;      // receives top, left, height and width of what there is
  bool begun = false;

  JSAMPROW place(int64_t row, int64_t left, int64_t columns) {
    if (!begun) box[0] = row, box[1] = left, box[3] = columns, begun = true;
    box[2] = row + 1 - box[0];
    return box[2] * 3 * columns <= capacity ? pixels + (row - box[0]) * 3 * columns : nullptr;
  }
  void placed(int64_t) {}
};

// Rows reduced as they come.
struct Reduced {
  const Task& task;
  area::Resizer resizer;
  std::vector<uint8_t> pixels = {};
  int64_t before = 0;  // pixels of a row left of the box

  // At an odd address: to an aligned one libjpeg-turbo writes past the caches, and reading is slow.
  uint8_t* row() { return pixels.data() + 1; }
  JSAMPROW place(int64_t, int64_t left, int64_t columns) {
    pixels.resize(3 * columns + 1);
    before = task.left() - left;
    return row();
  }
  void placed(int64_t number) {
    if (number >= task.top()) resizer.add(row() + 3 * before);
  }
};

}  // namespace

// Decodes the box of a JPEG of height x width pixels, each side divided by `divisor`: 1, 2, 4 or 8.
//
// Receives, in `placed`, top, left, height and width of what `pixels` holds (RGB, at most
// `capacity` bytes): the box and a margin. Returns 0, or 1 if the data are damaged; `to_end` looks
// below the box too, and takes bytes left over before the end for damage.
extern "C" int64_t decode_box(const uint8_t* data, uint64_t bytes, int64_t height, int64_t width,
                              const int64_t* box, int64_t divisor, int64_t to_end, uint8_t* pixels,
                              int64_t capacity, int64_t* placed) {
  const Task task{data, bytes, height, width, box, divisor, to_end};
  return decode(task, [&] { return Stored{pixels, capacity, placed}; });
}

// The same, reduced by area to target_height x target_width RGB pixels, and mirrored if asked.
// Returns -1 without doing anything where a side would grow or, at full size, not area::applies.
extern "C" int64_t decode_reduced(const uint8_t* data, uint64_t bytes, int64_t height,
                                  int64_t width, const int64_t* box, int64_t divisor,
                                  int64_t to_end, uint8_t* target, int64_t target_height,
                                  int64_t target_width, int64_t is_mirrored) {
  const Task task{data, bytes, height, width, box, divisor, to_end};
  const auto side = [&](int64_t begin, int64_t end, int n) {  // the box, to parts of a pixel
    const double scale = static_cast<double>(divisor);
    return area::Side(end - begin, box[n] / scale - begin, box[n + 2] / scale);
  };
  const area::Side rows = side(task.top(), task.bottom(), 0);
  const area::Side columns = side(task.left(), task.right(), 1);
  if (rows.length < target_height || columns.length < target_width) return -1;
  if (divisor == 1 && !area::applies(box[2], box[3], target_height, target_width)) return -1;
  const bool mirrored = is_mirrored != 0;
  return decode(task, [&] {
    return Reduced{task, {rows, columns, target, target_height, target_width, mirrored}};
  });
}

// Pixels instead of a JPEG: a box of `pixels`, whose rows have `width` pixels.
extern "C" int64_t reduce(const uint8_t* pixels, int64_t width, const int64_t* box, uint8_t* target,
                          int64_t target_height, int64_t target_width, int64_t is_mirrored) {
  if (!area::applies(box[2], box[3], target_height, target_width)) return -1;
  area::Resizer resizer(area::Side{box[2]}, area::Side{box[3]}, target, target_height,
                        target_width, is_mirrored != 0);
  for (int64_t row = box[0]; row < box[0] + box[2]; ++row) {
    resizer.add(pixels + 3 * (row * width + box[1]));
  }
  return 0;
}
