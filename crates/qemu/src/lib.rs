//! QMP client, dirty bitmaps and fleecing, guest agent
