//! Shows a flat image, read-only, or with a writable layer: `serve_image SOCKET IMAGE [LAYER]`.

use std::fs::OpenOptions;
use std::sync::Arc;

use nbd::{CowDisk, Disk, FileDisk, Server};

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, image, ..] = &arguments[..] else { panic!("serve_image SOCKET IMAGE [LAYER]") };
    let mut disk: Arc<dyn Disk> = Arc::new(FileDisk::open(image)?);
    if let Some(layer) = arguments.get(2) {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(layer)?;
        disk = Arc::new(CowDisk::new(disk, file)?);
    }
    let server = Server::bind(socket)?;
    server.add("disk", disk)?;
    println!("{}", server.uri("disk"));
    server.serve(async { drop(tokio::signal::ctrl_c().await) }).await?;
    Ok(())
}
