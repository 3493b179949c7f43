//! Runs cycles: capture, encode, ship
