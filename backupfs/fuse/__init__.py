"""The mount: names, inode numbers and reads, answered to the kernel. Knows Images and names, no repository."""
