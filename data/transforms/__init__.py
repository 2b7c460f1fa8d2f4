"""The transforms that a YAML may name, one file each.

`Settings` is the schema of the YAML section and the transform itself, as batched tensor code:

- `draw(count, height, width, generator)` returns a table of random numbers, (count, k) float64 with fixed k; and
- `apply(images, draws)` maps uint8 (B, 3, H, W) and B rows of the table to uint8 (B, 3, H', W'); or
- `remap(rows, cols, draws)`, in transforms that only move pixels: consecutive ones are fused into one gather.

`PLACES` lists the sections of the YAML in which a transform is allowed. In `transform.pre` and `transform.test.primary` a
transform draws nothing; in `transform.pre`, `apply` also takes and returns PIL images. In `transform.*.remaining` it has
neither `draw` nor `apply`: its module has the `POSITION` that it must have in that list, and its settings may have a `mean` and
a `std`, which `data.augment.Pipeline` subtracts and divides by. A transform whose `remap` gives -1 for pixels from outside the
image has `pads_black`. `TO_ONE_SIZE` is an example of a `transform.pre` that brings images of all sizes to one size.

The draws are made outside of the transforms, so that every device, a resumed run and a reference use the same ones. `apply` and
`remap` run within a step that CUDA captures as a graph: their operators and shapes may depend on shapes and settings only, and
nothing may be read from the device or sent to it. (`torch.where` with a number sends it to the device; `masked_fill` does not.)
"""

DECLARED = ("Settings", "PLACES")
