// A JPEG coded anew from the same coefficients, and so with the same pixels, by libjpeg-turbo: in one
// scan, with Huffman codes made for it, and with restart markers.

#include <csetjmp>
#include <cstdint>
#include <cstdio>

#include <jpeglib.h>

#include <jerror.h>

namespace {

// A crop is found to this many units (MCUs), mostly of 16 x 16 pixels. A marker costs 5 bytes or so.
constexpr unsigned RESTART_INTERVAL = 8;

struct Errors {
  jpeg_error_mgr manager;
  jmp_buf failed;
};

void on_error(j_common_ptr image) { longjmp(reinterpret_cast<Errors*>(image->err)->failed, 1); }

// All there is room for.
struct Target {
  jpeg_destination_mgr manager;
  uint8_t* bytes;
  uint64_t capacity;
};

void begin(j_compress_ptr image) {
  Target& target = *reinterpret_cast<Target*>(image->dest);
  target.manager.next_output_byte = target.bytes;
  target.manager.free_in_buffer = target.capacity;
}
boolean is_full(j_compress_ptr image) { ERREXIT(image, JERR_BUFFER_SIZE); return FALSE; }
void end(j_compress_ptr) {}

// Of a progressive JPEG whose scans leave something open, decoders smooth what they show.
bool is_complete(const jpeg_decompress_struct& image) {
  for (int n = 0; n < image.num_components && image.progressive_mode; ++n) {
    for (int place = 0; place < DCTSIZE2; ++place) {
      if (image.coef_bits[n][place]) return false;
    }
  }
  return true;
}

}  // namespace

// Returns how many bytes of `target` it takes; 0 where it cannot be, the pixels might be others, or
// `capacity` is too small.
extern "C" uint64_t transcode(const uint8_t* data, uint64_t bytes, uint8_t* target,
                              uint64_t capacity) {
  Errors errors;
  jpeg_decompress_struct from{};
  jpeg_compress_struct to{};
  from.err = to.err = jpeg_std_error(&errors.manager);
  errors.manager.error_exit = on_error;
  errors.manager.output_message = [](j_common_ptr) {};
  Target place{{nullptr, 0, begin, is_full, end}, target, capacity};
  volatile uint64_t made = 0;
  if (!setjmp(errors.failed)) {
    jpeg_create_decompress(&from);
    jpeg_create_compress(&to);
    jpeg_mem_src(&from, data, bytes);
    jpeg_read_header(&from, TRUE);
    jvirt_barray_ptr* coefficients = jpeg_read_coefficients(&from);
    if (errors.manager.num_warnings || !is_complete(from)) on_error((j_common_ptr)&from);
    jpeg_copy_critical_parameters(&from, &to);
    to.dest = &place.manager;
    to.optimize_coding = TRUE;
    to.restart_interval = RESTART_INTERVAL;
    jpeg_write_coefficients(&to, coefficients);
    jpeg_finish_compress(&to);
    made = capacity - place.manager.free_in_buffer;
  }
  jpeg_destroy_compress(&to);
  jpeg_destroy_decompress(&from);
  return made;
}
