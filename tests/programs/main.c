/* Draws noise, packs it as PNG and JPEG, unpacks, resizes and compresses it: integers, floats, vectors, memory. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stb/stb_dxt.h>
#include <stb/stb_image.h>
#include <stb/stb_image_resize.h>
#include <stb/stb_image_write.h>
#include <stb/stb_perlin.h>

enum { WIDE = 256, HIGH = 192, CHANNELS = 4 };

static unsigned char file[1 << 20];
static int length;

static void append(void *context, void *data, int size)
{
	(void)context;
	if (length + size > (int)sizeof file)
		exit(2);
	memcpy(file + length, data, size);
	length += size;
}

static void show(const char *what, const unsigned char *data, size_t size)
{
	unsigned long hash = 14695981039346656037ul;
	for (size_t i = 0; i < size; i++)
		hash = (hash ^ data[i]) * 1099511628211ul;
	printf("%s %zu %016lx\n", what, size, hash);
}

int main(void)
{
	static unsigned char image[HIGH][WIDE][CHANNELS], small[HIGH / 3][WIDE / 3][CHANNELS], block[8];
	for (int y = 0; y < HIGH; y++)
		for (int x = 0; x < WIDE; x++)
			for (int c = 0; c < CHANNELS; c++)
				image[y][x][c] = 127 + 120 * stb_perlin_fbm_noise3(x / 31.f, y / 23.f, c, 2, .5f, 6);
	show("noise", image[0][0], sizeof image);
	for (int jpeg = 0; jpeg < 2; jpeg++) {
		length = 0;
		if (jpeg)
			stbi_write_jpg_to_func(append, NULL, WIDE, HIGH, CHANNELS, image, 80);
		else
			stbi_write_png_to_func(append, NULL, WIDE, HIGH, CHANNELS, image, 0);
		show(jpeg ? "jpeg" : "png", file, length);
		int wide, high, channels;
		unsigned char *back = stbi_load_from_memory(file, length, &wide, &high, &channels, CHANNELS);
		if (!back || wide != WIDE || high != HIGH)
			return 1;
		show("back", back, sizeof image);
		free(back);
	}
	stbir_resize_uint8(image[0][0], WIDE, HIGH, 0, small[0][0], WIDE / 3, HIGH / 3, 0, CHANNELS);
	show("small", small[0][0], sizeof small);
	stb_compress_dxt_block(block, image[7][0], 0, STB_DXT_HIGHQUAL);
	show("dxt", block, sizeof block);
	return 0;
}
