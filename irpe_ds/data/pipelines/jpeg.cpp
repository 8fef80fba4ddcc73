// A box of a JPEG, by libjpeg-turbo: of what lies outside of it, entropy coding alone is undone, and
// below it nothing. At 1, 1/2, 1/4 or 1/8 of the size.

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>

#include <jpeglib.h>

#include <jerror.h>

namespace {

struct Errors {
  jpeg_error_mgr manager;
  jmp_buf failed;
  bool damaged;
};

Errors& errors_of(j_common_ptr image) { return *reinterpret_cast<Errors*>(image->err); }

void on_error(j_common_ptr image) { longjmp(errors_of(image).failed, 1); }

// Warnings are damage, but for those that change no pixel, as in irpe_ds/data/beton/jpeg.py: a version
// of JFIF or an Adobe transform that no one has defined, and bytes before the end of the image.
void on_message(j_common_ptr image, int level) {
  const jpeg_error_mgr& error = *image->err;
  const int code = error.msg_code;
  const bool leftover = code == JWRN_EXTRANEOUS_DATA && error.msg_parm.i[1] == JPEG_EOI;
  const bool changes_pixels = !leftover && code != JWRN_JFIF_MAJOR && code != JWRN_ADOBE_XFORM;
  if (level < 0 && changes_pixels) errors_of(image).damaged = true;
}

}  // namespace

// Decodes the box of a JPEG of height x width pixels, each side divided by `divisor`: 1, 2, 4 or 8.
//
// Receives, in `placed`, top, left, height and width of what `pixels` holds (RGB, at most
// `capacity` bytes): the box and a margin, without which upsampled colours at its edges would be
// other than in the whole image. Returns 0, or 1 if the data are damaged; `to_end` looks below the
// box too.
extern "C" int64_t decode_box(const uint8_t* data, uint64_t bytes, int64_t height, int64_t width,
                              const int64_t* box, int64_t divisor, int64_t to_end, uint8_t* pixels,
                              int64_t capacity, int64_t* placed) {
  jpeg_decompress_struct image;
  Errors errors;
  image.err = jpeg_std_error(&errors.manager);
  errors.manager.error_exit = on_error;
  errors.manager.emit_message = on_message;
  errors.damaged = false;
  if (setjmp(errors.failed)) {
    jpeg_destroy_decompress(&image);
    return 1;
  }
  jpeg_create_decompress(&image);
  jpeg_mem_src(&image, data, bytes);
  jpeg_read_header(&image, TRUE);
  image.out_color_space = JCS_RGB;
  image.dct_method = JDCT_IFAST;  // as FFCV's own decoder
  image.scale_num = 1;
  image.scale_denom = static_cast<unsigned>(divisor);
  if (image.image_height != height || image.image_width != width) on_error((j_common_ptr)&image);
  jpeg_start_decompress(&image);

  const int64_t unit = image.min_DCT_scaled_size, margin = image.max_h_samp_factor * unit;
  const int64_t top = std::max<int64_t>(0, box[0] / divisor - image.max_v_samp_factor * unit);
  const int64_t bottom = std::min<int64_t>((box[0] + box[2] + divisor - 1) / divisor, image.output_height);
  const int64_t first = std::max<int64_t>(0, box[1] / divisor - margin);
  const int64_t last =
      std::min<int64_t>((box[1] + box[3] + divisor - 1) / divisor + margin, image.output_width);
  JDIMENSION left = static_cast<JDIMENSION>(first), columns = static_cast<JDIMENSION>(last - first);
  jpeg_crop_scanline(&image, &left, &columns);  // to whole units
  if (top > 0) jpeg_skip_scanlines(&image, static_cast<JDIMENSION>(top));

  const int64_t row_bytes = int64_t{3} * image.output_width;
  if ((bottom - top) * row_bytes > capacity) on_error((j_common_ptr)&image);
  while (image.output_scanline < bottom) {
    JSAMPROW row = pixels + (image.output_scanline - top) * row_bytes;
    jpeg_read_scanlines(&image, &row, 1);
  }
  if (to_end) {
    const JDIMENSION below = image.output_height - image.output_scanline;
    if (below > 1) jpeg_skip_scanlines(&image, below - 1);  // skipping all would read nothing
    JSAMPARRAY last_row = image.mem->alloc_sarray((j_common_ptr)&image, JPOOL_IMAGE, row_bytes, 1);
    if (below > 0) jpeg_read_scanlines(&image, last_row, 1);
    jpeg_finish_decompress(&image);
  }
  placed[0] = top, placed[1] = left, placed[2] = bottom - top, placed[3] = image.output_width;
  jpeg_destroy_decompress(&image);
  return errors.damaged;
}
