"""Running a net over many images, range by range, in bounded memory."""
