"""The studies: claims about batch normalisation, and the measurements that test them."""
