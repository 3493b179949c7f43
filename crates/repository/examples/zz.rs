use zstd::zstd_safe::{CParameter as P, Strategy as S, ParamSwitch};
fn main(){
  let a:Vec<String>=std::env::args().collect();
  let all=std::fs::File::open(&a[1]).unwrap();
  use std::os::unix::fs::FileExt;
  let chunk=640<<10;
  let n=|i:usize|a[i].parse::<u32>().unwrap();
  let mut c=zstd::bulk::Compressor::new(n(2) as i32).unwrap();
  if n(3)>0 {c.set_parameter(P::UseBlockSplitter(ParamSwitch::Enable)).unwrap();}
  if a.len()>4 { for p in [P::HashLog(n(4)),P::ChainLog(n(5)),P::MinMatch(n(6))] {c.set_parameter(p).unwrap();} }
  if a.len()>7 { c.set_parameter(P::Strategy(match a[7].as_str(){"fast"=>S::ZSTD_fast,"greedy"=>S::ZSTD_greedy,_=>S::ZSTD_dfast})).unwrap(); }
  let mut buf=vec![0u8; zstd::zstd_safe::compress_bound(chunk)];
  let mut p=vec![0u8;chunk]; let (mut total,mut raw)=(0usize,0usize);
  let size=all.metadata().unwrap().len(); let mut off=0; 
  while off+(chunk as u64)<size { all.read_exact_at(&mut p,off).unwrap(); off+=3*chunk as u64; if p.iter().all(|b|*b==0){continue;} raw+=chunk; total+=c.compress_to_buffer(&p,&mut buf).unwrap().min(p.len()); }
  print!("{:?} raw {} MB -> {} KB ",&a[2..],raw/1000000,total/1000);
}
