"""What a guest made of its disks: partitions, logical volumes. Functions on Images; all that they read is hostile."""
