//! Which bytes a recovery point has: extent index, what to apply, compact and drop; pure
