/* image.h: decoding, resizing and loading images. */
#ifndef VX_IMAGE_H
#define VX_IMAGE_H
#endif
