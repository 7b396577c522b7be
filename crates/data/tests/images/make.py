"""Writes the images that the tests of src/examples/images/decode.rs read: 24 x 16 pixels in four colours. Needs Pillow 12."""
from pathlib import Path

from PIL import Image

here = Path(__file__).parent
quarters = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
picture = Image.new("RGB", (24, 16))
for y in range(16):
    for x in range(24):
        picture.putpixel((x, y), quarters[2 * (y // 8) + x // 12])


def save(name, image=picture, **how):
    image.save(here / name, **how)


save("baseline.jpg", quality=90)
save("progressive.jpg", quality=90, progressive=True)
save("restarts.jpg", quality=90, restart_marker_blocks=1)
save("rgb.png")
save("palette.png", picture.convert("P", palette=Image.Palette.ADAPTIVE))
save("lossless.webp", lossless=True)
save("lossy.webp", quality=95)
save("still.gif")
other = picture.transpose(Image.Transpose.ROTATE_180)
save("moving.gif", save_all=True, append_images=[other])
save("moving.webp", save_all=True, append_images=[other], lossless=True)
save("lzw.tif", compression="tiff_lzw")
save("pages.tif", save_all=True, append_images=[other])
sixteen = Image.new("I;16", (24, 16))
grey = picture.convert("L")
for y in range(16):
    for x in range(24):
        sixteen.putpixel((x, y), grey.getpixel((x, y)) * 257)
save("sixteen.tif", sixteen)
save("plain.bmp")
