"""A vocabulary of things that can be seen, for describing differences without a language model."""

from __future__ import annotations

MEDIA = """
a photo; a painting; an oil painting; a watercolour; a drawing; a pencil sketch; a line drawing; a cartoon; a comic;
an illustration; clip art; a logo; an icon; an emoji; a poster; a map; a diagram; a screenshot; a computer rendering;
a sculpture; a statue; a toy; an engraving; a tattoo; embroidery; graffiti; a mosaic; a silhouette; a black and white
image; a colourful image; a sepia image; a blurry image; a sharp image; a grainy image; a dark image; a bright image;
a close-up; an aerial view; an image with a white background; an image with a black background; an image with text; an
abstract image; a collage; a portrait; a landscape; a still life; thick outlines; flat colours; brush strokes
"""
SCENES = """
indoors; outdoors; at night; in daylight; at sunset; in fog; in rain; in snow; under water; in the sky; on a beach; by
a lake; by a river; at sea; in the mountains; in a forest; in a desert; in a field; in a garden; in a park; on a
street; in traffic; in a city; in a village; on a farm; in a kitchen; in a bathroom; in a bedroom; in a living room;
in an office; in a classroom; in a shop; in a restaurant; in a factory; in a hospital; in a museum; in a church; in a
stadium; at a station; at an airport; on a table; on a wall; on grass; on a road; a crowd; an empty place
"""
THINGS = """
a person; a man; a woman; a child; a baby; a face; hands; a dog; a cat; a horse; a cow; a sheep; an elephant; a
giraffe; a bear; a bird; a fish; an insect; a butterfly; a reptile; a monkey; a tree; flowers; leaves; fruit;
vegetables; bread; meat; cake; drinks; a plate of food; a car; a truck; a bus; a motorcycle; a bicycle; a train; a
boat; an aeroplane; a house; a tower; a bridge; a door; a window; a chair; a table; a bed; a sofa; a lamp; a clock; a
book; a computer; a phone; a camera; a guitar; a piano; a ball; a hat; shoes; clothes; a bag; glasses; an umbrella; a
bottle; a cup; a knife; a tool; a machine; a sign; a flag; jewellery; a weapon; money; a box; stones; clouds; fire;
water; ice; smoke
"""
LOOKS = """
red; orange; yellow; green; blue; purple; pink; brown; black; white; grey; gold; silver; transparent; shiny; matte;
rough; smooth; striped; spotted; round; square; long; tall; tiny; huge; old; new; broken; dirty; clean; wet; wooden;
metal; plastic; glass; stone; fabric; fur; feathers; moving fast; standing still; sitting; running; flying; swimming;
eating; sleeping; smiling; playing; working
"""


def visual_vocabulary() -> list[str]:
    """About 230 phrases: media and styles, scenes, things, looks."""
    return [" ".join(entry.split()) for part in (MEDIA, SCENES, THINGS, LOOKS) for entry in part.split(";")]
