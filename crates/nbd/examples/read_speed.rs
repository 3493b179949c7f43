//! How fast the client reads: `read_speed SOCKET EXPORT [CONNECTIONS] [IN_FLIGHT] [REQUEST_BYTES]`.

use std::time::Instant;

use futures::{StreamExt, TryStreamExt, stream};

#[tokio::main(worker_threads = 2)]
async fn main() -> nbd::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, export, ..] = &arguments[..] else { panic!("read_speed SOCKET EXPORT ...") };
    let number = |place: usize, default: u64| {
        arguments.get(place).map_or(default, |text| text.parse().expect("a number"))
    };
    let (connections, in_flight, request_bytes) =
        (number(2, 4) as usize, number(3, 8) as usize, number(4, 1 << 20));
    let pool = nbd::Pool::connect(socket, export, &[nbd::BASE_ALLOCATION], connections).await?;
    let size_bytes = pool.size_bytes();
    let started = Instant::now();
    let reads = (0..size_bytes.div_ceil(request_bytes)).map(|place| {
        let offset = place * request_bytes;
        pool.read(offset, request_bytes.min(size_bytes - offset))
    });
    let read_bytes = stream::iter(reads)
        .buffer_unordered(connections * in_flight)
        .try_fold(0, |sum, bytes| async move { Ok(sum + bytes.len() as u64) })
        .await?;
    let seconds = started.elapsed().as_secs_f64();
    println!("{read_bytes} bytes in {seconds:.3} s: {:.0} MB/s", read_bytes as f64 / seconds / 1e6);
    Ok(())
}
