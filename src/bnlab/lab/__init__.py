"""The studies: claims about batch normalisation, and what measuring them comes to."""
