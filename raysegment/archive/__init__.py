"""Files: snapshots of weather and climate archives in, class masks in and out, shards of tiles for training."""
