"""The ops, one file each; ``fastcss.ops`` has their public names."""
